# The MQ_ functions for a connection.


cdef ConnectionCell *connection_here(MQ_SmtpConnection *connection,
                                     const char *function) noexcept nogil:
    # Return the connection, for a function that is only for the thread of the worker. Otherwise log
    # the call and return NULL.
    cdef uint64_t handle = <uint64_t> connection
    cdef Block *block = block_of(handle, CONNECTION)
    cdef const char *problem = NULL
    if block == NULL or block.owner == NULL:
        problem = ": not a connection"
    elif not at_home(block.owner):
        problem = " was called on another thread than the worker's"
    elif identity_of(cell_in(block, handle).word) != identity_of(handle):
        problem = ": the connection is gone"
    if problem == NULL:
        return <ConnectionCell *> cell_in(block, handle)
    report(MQ_WARN, block.owner if block != NULL else NULL, plugin_of(handle),
           "%s%s; ignored", function, problem)
    return NULL


cdef public int MQ_SmtpFileDescriptor(MQ_SmtpConnection *connection) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_SmtpFileDescriptor")
    return cell.fd if cell != NULL and not cell.closed else -1


cdef public c_bool MQ_SmtpAuthenticated(MQ_SmtpConnection *connection) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_SmtpAuthenticated")
    return cell != NULL and cell.authenticated


cdef public void MQ_SetSmtpAuthenticated(MQ_SmtpConnection *connection,
                                         c_bool authenticated) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_SetSmtpAuthenticated")
    if cell != NULL:
        cell.authenticated = authenticated
        cell.decided = True


cdef public c_bool MQ_SmtpSecure(MQ_SmtpConnection *connection) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_SmtpSecure")
    return cell != NULL and cell.secure


cdef const char *fact_of(MQ_SmtpConnection *connection, int number, size_t *size,
                         const char *function) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, function)
    cdef Fact *fact = cell.facts[number] if cell != NULL else NULL
    if size != NULL:
        size[0] = fact.size if fact != NULL else 0
    return fact.text if fact != NULL else NULL


cdef public const char *MQ_ClientAddress(MQ_SmtpConnection *connection,
                                         size_t *size) noexcept nogil:
    return fact_of(connection, FACT_ADDRESS, size, "MQ_ClientAddress")


cdef public int MQ_ClientPort(MQ_SmtpConnection *connection) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_ClientPort")
    return cell.port if cell != NULL else 0


cdef public const char *MQ_ClientHelo(MQ_SmtpConnection *connection,
                                      size_t *size) noexcept nogil:
    return fact_of(connection, FACT_HELO, size, "MQ_ClientHelo")


cdef public const char *MQ_ClientLogin(MQ_SmtpConnection *connection,
                                       size_t *size) noexcept nogil:
    return fact_of(connection, FACT_LOGIN, size, "MQ_ClientLogin")


cdef public const char *MQ_ClientTlsVersion(MQ_SmtpConnection *connection,
                                            size_t *size) noexcept nogil:
    return fact_of(connection, FACT_TLS_VERSION, size, "MQ_ClientTlsVersion")


cdef public const char *MQ_ClientTlsCipher(MQ_SmtpConnection *connection,
                                           size_t *size) noexcept nogil:
    return fact_of(connection, FACT_TLS_CIPHER, size, "MQ_ClientTlsCipher")


cdef public const char *MQ_ClientTlsName(MQ_SmtpConnection *connection,
                                         size_t *size) noexcept nogil:
    return fact_of(connection, FACT_TLS_NAME, size, "MQ_ClientTlsName")


cdef public void *MQ_SmtpData(MQ_SmtpConnection *connection) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_SmtpData")
    return cell.data[plugin_of(<uint64_t> connection)] if cell != NULL else NULL


cdef public void MQ_SetSmtpData(MQ_SmtpConnection *connection, void *data) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_SetSmtpData")
    if cell != NULL:
        cell.data[plugin_of(<uint64_t> connection)] = data


cdef public void MQ_Reject(MQ_SmtpConnection *connection, int code,
                           const char *text) noexcept nogil:
    cdef ConnectionCell *cell = connection_here(connection, "MQ_Reject")
    cdef uint64_t handle = <uint64_t> connection
    cdef int plugin = plugin_of(handle)
    cdef EventCell *event
    cdef uint64_t word
    if cell == NULL:
        return
    event = cell.event
    word = load(&event.cell.word) if event != NULL else 0
    if plugin_of(word) != plugin or not RUNNING <= word & STATE_MASK < GIVEN_UP:
        report(MQ_WARN, cell.worker, plugin, "%s: %s; ignored", "MQ_Reject",
               "no event of this connection is in the plugin's hands")
        return
    if event.number == CLOSE or event.number == OUT_SENT:
        report(MQ_WARN, cell.worker, plugin, "%s in %s is too late; ignored", "MQ_Reject",
               FUNCTIONS[event.number])
        return
    if not 400 <= code <= 599:
        report(MQ_WARN, cell.worker, plugin, "%s in %s: the code is not 400 to 599; taken as 451",
               "MQ_Reject", FUNCTIONS[event.number])
        code = 451
    event.code = code
    event.noted = True
    free(event.text)
    event.text = strndup(text, TEXT_LIMIT) if text != NULL else NULL


cdef public size_t MQ_SmtpSend(MQ_SmtpConnection *connection, const void *data,
                               size_t size) noexcept nogil:
    cdef uint64_t handle = <uint64_t> connection
    cdef Block *block = block_of(handle, CONNECTION)
    cdef Worker *worker = block.owner if block != NULL else NULL
    cdef ConnectionCell *cell
    cdef size_t sent = 0
    cdef bint news = False
    if worker == NULL or data == NULL or size == 0:
        return 0
    # The worker is never freed, and under its mutex the connection is not freed either.
    pthread_mutex_lock(&worker.mutex)
    cell = <ConnectionCell *> cell_of(handle, CONNECTION)
    if cell != NULL and not cell.closed and append_output(cell, <const char *> data, size):
        sent = size
        # After an event of the connection the engine checks for output itself.
        if not (at_home(worker) and worker.current != NULL and worker.current.connection == cell):
            news = announce(cell)
    pthread_mutex_unlock(&worker.mutex)
    if news:
        wake(worker)
    return sent


cdef bint announce(ConnectionCell *cell) noexcept nogil:
    # List a connection with output for the engine. Needs the mutex. Return False if it is listed or
    # has no output.
    if cell.queued or cell.output_size == 0:
        return False
    cell.queued = True
    cell.next_output = cell.worker.outputs
    cell.worker.outputs = cell
    return True


cdef bint append_output(ConnectionCell *cell, const char *data, size_t size) noexcept nogil:
    cdef size_t room = cell.output_room
    cdef char *larger
    if size > room - cell.output_size:
        if size > OUTPUT_LIMIT - cell.output_size:
            return False
        room = max(2 * room, cell.output_size + size, <size_t> 256)
        larger = <char *> realloc(cell.output, room)
        if larger == NULL:
            return False
        cell.output = larger
        cell.output_room = room
    memcpy(cell.output + cell.output_size, data, size)
    store_size(&cell.output_size, cell.output_size + size)
    return True
