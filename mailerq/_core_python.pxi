# The classes that plugins.py builds on: contexts, connections, and suspended calls.


cdef class Nothing:
    """A ready awaitable, for an event that ended without a reject. There is one instance."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


cdef Nothing nothing = Nothing()
NOTHING = nothing


cdef class Context:
    """A worker thread as plugins see it. Make, use and end it on that thread.

    plugins.py derives from this class and adds the coroutine `settle`, which finishes a `Call`.
    """

    cdef Worker *worker
    cdef Table *table
    cdef bint ended             # instead of worker.open: another context may have the worker now
    cdef readonly Library library

    def __cinit__(self, Library library, *args, **kwargs):
        self.library = library
        self.table = library.table
        self.worker = open_worker(library.table)
        if self.worker == NULL:
            raise MemoryError

    def __dealloc__(self):
        # Do not call the method: at the end of the interpreter the class may be torn down.
        if self.worker != NULL and not self.ended:
            self.ended = True
            shut(self)

    def fileno(self):
        """Return a descriptor that is readable when `turn` has work."""
        return self.worker.wakeup

    def start(self):
        """Call mq_context_initialize of every plugin; await the result."""
        cdef EventCell *event = begin(self, None, CONTEXT_INITIALIZE)
        self.worker.context = event
        self.worker.context_identity = identity_of(event.cell.word)
        return run(self, event, None, None, None)

    def stop(self):
        """Call mq_context_cleanup of every plugin; await the result."""
        return run(self, begin(self, None, CONTEXT_CLEANUP), None, None, None)

    def end(self):
        """Free the objects of the worker. All of its handles become invalid."""
        if not self.ended:
            self.ended = True
            shut(self)

    def turn(self):
        """Run due timers and watchers, continue events that were handed back, call `on_output`.

        Returns the calls that have finished or moved to another plugin.
        """
        cdef Worker *worker = self.worker
        cdef uint64_t count
        cdef EventCell *event
        cdef EventCell *following
        cdef ConnectionCell *cell
        cdef bint closed = False
        moved = []
        with nogil:
            if read(worker.wakeup, &count, sizeof(count)) < 0 and errno == EBADF:
                closed = True
            enter(worker)
            if worker.loop != NULL:
                invoke_pending(worker)
            event = resume(worker)
            leave(worker)
            if load_event(&worker.handed) != NULL:
                wake(worker)
        if closed:
            self.mend()
        while event != NULL:
            following = event.moved
            call = <Call> event.call
            if call.abandoned:
                self.take_back(call)
            else:
                moved.append(call)
            event = following
        for connection in self.take_outputs():
            try:
                connection.on_output()
            except Exception:
                logger.exception("the output of plugins could not be sent")
        if load_line(&lines) != NULL:
            flush_log()
        return moved

    def mend(self):
        """Open another descriptor for `fileno`, because a plugin closed it.

        Return False if no descriptor is left.
        """
        if not mend_wakeup(self.worker):
            return False
        self.stray()
        return True

    cdef take_back(self, Call call):
        # Close a call that was given up and has now been handed back.
        connection = call.connection
        call.abandoned = False
        call.close()
        if connection is not None:
            (<Connection> connection).cell.kept -= 1
            if (<Connection> connection).closing and not (<Connection> connection).cell.kept:
                self.close_now(connection)

    cdef list take_outputs(self):
        cdef Worker *worker = self.worker
        cdef ConnectionCell *cell
        connections = []
        pthread_mutex_lock(&worker.mutex)
        cell = worker.outputs
        worker.outputs = NULL
        while cell != NULL:
            cell.queued = False
            if cell.python != NULL and (<Connection> cell.python).on_output is not None:
                connections.append(<Connection> cell.python)
            cell = cell.next_output
        pthread_mutex_unlock(&worker.mutex)
        return connections

    @property
    def running(self):
        """The plugin and function that the thread is in now, or None. Any thread."""
        cdef int plugin = self.worker.running_plugin
        if plugin < 0 or not self.worker.open:
            return None
        return self.library.names[plugin], FUNCTIONS[self.worker.running_event].decode()

    @property
    def live(self):
        """The number of live objects of each kind, for tests that expect zeros."""
        cdef int own = self.worker.context != NULL
        cdef long *live = self.worker.live
        return {"events": live[EVENT] - own, "connections": live[CONNECTION],
                "messages": live[MESSAGE], "timers": live[TIMER], "watchers": live[WATCHER]}


cdef shut(Context context):
    # Free events that were given up and never handed back, and the memory that they keep.
    cdef Worker *worker = context.worker
    cdef EventCell *event
    with nogil:
        close_loop(worker)
    while worker.waiting != NULL:
        event = worker.waiting
        unlist(event)
        call = <Call> event.call
        call.event = NULL
        strip(event)
        Py_DECREF(call)
    if context.library is not None:  # the garbage collector may have cleared it
        context.library.add_figures(worker, context.library.totals)
    close_worker(worker)
    flush_log()


cdef EventCell *begin(Context context, Connection connection, int number) except NULL:
    cdef EventCell *event
    if context.ended:
        raise RuntimeError("the context has ended")
    if connection is not None and connection.cell.event != NULL:
        raise RuntimeError("another event of this connection is still going on")
    event = <EventCell *> take(context.worker, EVENT)
    if event == NULL:
        raise MemoryError
    event.worker = context.worker
    event.table = context.table
    event.number = number
    event.position = 0
    event.restarts = 0
    event.outcome = UNDECIDED
    event.finished = False
    event.noted = False
    event.cancelled = False
    event.code = 0
    event.text = NULL
    event.message = NULL
    memset(&event.first, 0, sizeof(Text))
    memset(&event.second, 0, sizeof(Text))
    event.call = NULL
    event.connection = NULL
    if connection is not None:
        event.connection = connection.cell
        connection.cell.event = event
        connection.cell.decided = False
    return event


cdef inline void strip(EventCell *event) noexcept:
    if event.number == AUTHENTICATE and event.second.lent != NULL:
        explicit_bzero(event.second.lent, event.second.size)
    if event.text != NULL:
        free(event.text)
        event.text = NULL
    drop(&event.first)
    drop(&event.second)
    if event.message != NULL:
        close_message(event.message)
        event.message = NULL


cdef inline void release(EventCell *event) noexcept:
    # Free an event and invalidate its handles. The worker keeps its event of mq_context_initialize.
    strip(event)
    if event.connection != NULL:
        event.connection.event = NULL
        event.connection = NULL
    if event != event.worker.context:
        give(event.worker, EVENT, &event.cell)


cdef run(Context context, EventCell *event, Connection connection, object first, object second):
    # Call the whole chain in one crossing; the caller awaits the result. If no plugin decided
    # otherwise, return `nothing` and make no object.
    cdef Worker *worker = context.worker
    cdef Call call
    if context.table.length[event.number] == 0:
        finish(event, UNDECIDED, -1)
    else:
        with nogil:
            enter(worker)
            cross(event)
            leave(worker)
    if load_line(&lines) != NULL:
        flush_log()
    if load_event(&worker.handed) != NULL:
        wake(worker)
    if (event.finished and event.outcome <= DECIDED
            and not (event.number == AUTHENTICATE and event.connection.decided)
            and not (context.table.python_events >> event.number & 1)):
        release(event)
        return nothing
    call = Call.__new__(Call)
    call.context = context
    call.connection = connection
    call.first = first
    call.second = second
    call.event = event
    if not event.finished:
        event.call = <void *> call
        Py_INCREF(call)
    return context.settle(call)


cdef class Call:
    """An event that was suspended, or that ended with an outcome to handle.

    `task` and `scope` are for the code that waits for the event.
    """

    cdef EventCell *event       # NULL after close()
    cdef readonly Context context
    cdef readonly Connection connection
    cdef readonly object first
    cdef readonly object second
    cdef readonly bint abandoned    # the event was given up
    cdef readonly bint cancelled    # the session no longer waits for the outcome
    cdef public object task
    cdef public object scope

    cdef EventCell *open(self) except NULL:
        if self.event == NULL:
            raise RuntimeError("the call is closed")
        return self.event

    @property
    def name(self):
        """The name of the event: "rcptto"."""
        return EVENTS[self.open().number]

    @property
    def function(self):
        """The name of the callback: "mq_smtp_in_rcptto"."""
        return FUNCTIONS[self.open().number].decode()

    @property
    def finished(self):
        """Whether the event has ended or was given up."""
        return self.open().finished

    @property
    def outcome(self):
        return OUTCOMES[self.open().outcome]

    @property
    def plugin(self):
        """The plugin that has the event or caused its outcome; None if there is none."""
        cdef EventCell *event = self.open()
        cdef int plugin = event.culprit if event.finished else plugin_of(event.cell.word)
        return self.context.library.names[plugin] if plugin >= 0 else None

    @property
    def code(self):
        """The code of MQ_Reject."""
        return self.open().code

    @property
    def text(self):
        """The text of MQ_Reject, as bytes."""
        cdef EventCell *event = self.open()
        return event.text if event.text != NULL else b""

    def give_up(self):
        """Stop waiting for the plugin. Return False if it has just handed back."""
        if not give_up(self.open()):
            return False
        self.detach()
        return True

    def cancel(self):
        """Stop waiting for the outcome. When the event is handed back, call no other plugin."""
        if self.event.finished:
            self.close()
        else:
            self.cancelled = self.event.cancelled = self.event.noted = True

    cdef detach(self):
        # The plugin keeps the event, and the connection goes on without the event.
        self.abandoned = True
        self.task = self.scope = None
        if self.event.connection != NULL:
            self.event.connection.kept += 1
            self.event.connection.event = NULL
            self.event.connection = NULL

    def close(self):
        """Free the event. An event that was given up stays until it is handed back."""
        cdef EventCell *event = self.event
        if event == NULL or self.abandoned:
            return
        self.event = NULL
        if event.call != NULL:
            event.call = NULL
            Py_DECREF(self)
        release(event)


cdef class Connection:
    """One SMTP connection, incoming or outgoing, as plugins see it.

    Each event method calls the plugins and returns an awaitable. If that is `NOTHING`, the event is
    over; otherwise await it soon, because the timeout of a plugin starts at the await. Its value is
    None to go on, or the `Reject` that replaces the normal reply. Without listeners a method costs
    one test. A connection has one event at a time. Use it on the thread of the worker only.

    The engine sets `address`, `port`, `helo`, `login` and `tls_…` of the client. They are None or 0
    while unknown, and for an outgoing connection. Events end at `deadline`, apart from the extra
    time of `plugins.MORE_SECONDS`.
    """

    cdef ConnectionCell *cell
    cdef readonly Context context
    cdef public object on_output
    cdef public double deadline
    cdef bint incoming
    cdef bint closing           # `close` was called while a plugin keeps an event
    cdef object __weakref__

    def __cinit__(
        self, Context context not None, int fd, bint secure=False, on_output=None,
        bint incoming=True
    ):
        cdef ConnectionCell *cell
        cdef Worker *worker = context.worker
        cdef int plugins = context.table.plugins
        if context.ended:
            raise RuntimeError("the context has ended")
        if worker.orphans != NULL:
            adopt(worker)
        cell = <ConnectionCell *> take(worker, CONNECTION)
        if cell == NULL:
            raise MemoryError
        if cell.data == NULL:
            cell.data = <void **> calloc(plugins + 1, sizeof(void *))
            if cell.data == NULL:
                give(worker, CONNECTION, &cell.cell)
                raise MemoryError
        else:
            memset(cell.data, 0, plugins * sizeof(void *))
        cell.worker = worker
        cell.event = NULL
        cell.python = <void *> self
        cell.fd = fd
        cell.secure = secure
        cell.authenticated = False
        cell.decided = False
        cell.closed = False
        cell.queued = False
        cell.output = NULL
        cell.output_size = 0
        cell.output_room = 0
        cell.kept = 0
        cell.port = 0
        memset(cell.facts, 0, sizeof(cell.facts))
        cell.former = NULL
        self.deadline = INFINITY
        self.cell = cell
        self.context = context
        self.on_output = on_output
        self.incoming = incoming

    def __dealloc__(self):
        # The last reference may be dropped on any thread.
        cdef ConnectionCell *cell = self.cell
        cdef Worker *worker
        cdef ConnectionCell **link
        if cell == NULL or not cell.worker.open or cell.python != <void *> self:
            return
        worker = cell.worker
        pthread_mutex_lock(&worker.mutex)
        cell.python = NULL
        cell.closed = True
        free(cell.output)
        cell.output = NULL
        free_facts(cell)
        if cell.queued:
            link = &worker.outputs
            while link[0] != cell:
                link = &link[0].next_output
            link[0] = cell.next_output
        if at_home(worker):
            give(worker, CONNECTION, &cell.cell)
        else:
            cell.cell.next = worker.orphans
            worker.orphans = &cell.cell
        pthread_mutex_unlock(&worker.mutex)

    @property
    def fd(self):
        return self.cell.fd

    @property
    def secure(self):
        """Whether the connection is encrypted."""
        return self.cell.secure

    @secure.setter
    def secure(self, bint value):
        self.cell.secure = value

    @property
    def authenticated(self):
        """Whether the client has logged in; plugins may set this too."""
        return self.cell.authenticated

    @authenticated.setter
    def authenticated(self, bint value):
        self.cell.authenticated = value

    @property
    def decided(self):
        """Whether a plugin called MQ_SetSmtpAuthenticated in the latest event."""
        return self.cell.decided

    @property
    def address(self):
        """The IP address of the client; behind a proxy, of the client of the proxy."""
        return self.fact(FACT_ADDRESS)

    @address.setter
    def address(self, value):
        self.set_fact(FACT_ADDRESS, value)

    @property
    def port(self):
        """The port of the client; 0 if unknown."""
        return self.cell.port

    @port.setter
    def port(self, int value):
        self.cell.port = value

    @property
    def helo(self):
        """The name in the latest EHLO, HELO or LHLO."""
        return self.fact(FACT_HELO)

    @helo.setter
    def helo(self, value):
        self.set_fact(FACT_HELO, value)

    @property
    def login(self):
        """The login name of the client, from AUTH or from a proxy."""
        return self.fact(FACT_LOGIN)

    @login.setter
    def login(self, value):
        self.set_fact(FACT_LOGIN, value)

    @property
    def tls_version(self):
        """The version of TLS, such as "TLSv1.3"."""
        return self.fact(FACT_TLS_VERSION)

    @tls_version.setter
    def tls_version(self, value):
        self.set_fact(FACT_TLS_VERSION, value)

    @property
    def tls_cipher(self):
        """The cipher suite, such as "TLS_AES_256_GCM_SHA384"."""
        return self.fact(FACT_TLS_CIPHER)

    @tls_cipher.setter
    def tls_cipher(self, value):
        self.set_fact(FACT_TLS_CIPHER, value)

    @property
    def tls_name(self):
        """The name in the certificate of the client, if one was requested and verified."""
        return self.fact(FACT_TLS_NAME)

    @tls_name.setter
    def tls_name(self, value):
        self.set_fact(FACT_TLS_NAME, value)

    cdef object fact(self, int number):
        cdef Fact *fact = self.cell.facts[number]
        return fact.text[:fact.size].decode("utf-8", "surrogateescape") if fact != NULL else None

    cdef int set_fact(self, int number, object value) except -1:
        # Keep the old text while a plugin keeps an event, because the plugin may still read it.
        cdef Fact *former = self.cell.facts[number]
        cdef Fact *fact = NULL
        cdef const char *text
        cdef Py_ssize_t size
        if value is not None:
            encoded = value.encode("utf-8", "surrogateescape")
            text, size = encoded, len(encoded)
            fact = <Fact *> malloc(sizeof(Fact) + size)
            if fact == NULL:
                raise MemoryError
            fact.size = size
            memcpy(fact.text, text, size)
            fact.text[size] = 0
        self.cell.facts[number] = fact
        if former != NULL and self.cell.kept:
            former.next = self.cell.former
            self.cell.former = former
        else:
            free(former)
        return 0

    def listens(self, str event):
        """Whether a plugin or a Python handler listens to this event."""
        return self.heard(EVENTS.index(event))

    def take_output(self):
        """Return the bytes that plugins queued with MQ_SmtpSend since the last call."""
        cdef ConnectionCell *cell = self.cell
        cdef char *output
        cdef size_t size
        if load_size(&cell.output_size) == 0:
            return b""
        pthread_mutex_lock(&cell.worker.mutex)
        output = cell.output
        size = cell.output_size
        cell.output = NULL
        cell.output_size = 0
        cell.output_room = 0
        pthread_mutex_unlock(&cell.worker.mutex)
        try:
            return output[:size]
        finally:
            free(output)

    def send(self, bytes data not None):
        """Queue raw bytes for the peer, like MQ_SmtpSend; for Python handlers."""
        cdef MQ_SmtpConnection *handle = <MQ_SmtpConnection *> identity_of(self.cell.cell.word)
        return MQ_SmtpSend(handle, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef inline bint heard(self, int number):
        return ((self.context.table.c_events | self.context.table.python_events) >> number) & 1

    cdef plain(self, int number):
        if not self.heard(number):
            return nothing
        return run(self.context, begin(self.context, self, number), self, None, None)

    cdef text(self, int number, object text, object more):
        cdef EventCell *event
        if not self.heard(number):
            return nothing
        event = begin(self.context, self, number)
        borrow(&event.first, text)
        if number != DATA:
            own(&event.first)
        if more is not None:
            borrow(&event.second, more)
            own(&event.second)
        return run(self.context, event, self, text, more)

    cdef mail(self, int number, message, document):
        cdef EventCell *event
        if not self.heard(number):
            return nothing
        event = begin(self.context, self, number)
        try:
            event.message = open_message(event, message, message if document is None else document)
        except BaseException:
            release(event)
            raise
        return run(self.context, event, self, message, document)

    def connect(self):
        """mq_smtp_in_connect, before the banner. A `Reject` replaces the banner."""
        return self.plain(CONNECT)

    def secured(self):
        """mq_smtp_in_secure, after the TLS handshake. Sets `secure`."""
        self.cell.secure = True
        return self.plain(SECURE)

    def authenticate(self, str login not None, str password not None):
        """mq_smtp_in_authenticate: True or False if a plugin decided, else None or a `Reject`."""
        return self.text(AUTHENTICATE, login, password)

    def mailfrom(self, str address not None):
        """mq_smtp_in_mailfrom: the address without angle brackets, "" for the null sender."""
        return self.text(MAILFROM, address, None)

    def rcptto(self, str address not None):
        """mq_smtp_in_rcptto: the address without angle brackets."""
        return self.text(RCPTTO, address, None)

    def data(self, mime not None):
        """mq_smtp_in_data: the whole mail, once for each transaction.

        `mime` is bytes, or a memoryview of a mail in a file, with a NUL after its last byte.
        """
        return self.text(DATA, mime, None)

    def message(self, message not None):
        """mq_smtp_in_message, once for each recipient; plugins edit the `Message` in place."""
        return self.mail(ON_MESSAGE, message, None)

    def out_data(self, message not None, document=None):
        """mq_smtp_out_data, after the reply 354. Plugins edit `message`, which this attempt sends.

        `document` is the stored message, which MQ_Json shows and edits; `message` by default.
        """
        return self.mail(OUT_DATA, message, message if document is None else document)

    def out_sent(self, message not None, document=None):
        """mq_smtp_out_sent, after the final dot was written. Arguments as for `out_data`."""
        return self.mail(OUT_SENT, message, message if document is None else document)

    def close(self):
        """mq_smtp_in_close, after a suspended event of this connection was handed back.

        Waits for a suspended event until it is given up. While plugins keep events that were given
        up, returns `NOTHING`: the event `close` follows when the last one is handed back. The end
        of an outgoing connection is not an event.
        """
        self.cell.closed = True
        self.on_output = None  # breaks a cycle: it is usually a method of our owner
        if self.cell.event != NULL:
            return self.context.close_later(self, <Call> self.cell.event.call)
        if self.cell.kept:
            self.closing = True
            return nothing
        return self.plain(CLOSE) if self.incoming else nothing


cdef void adopt(Worker *worker) noexcept nogil:
    # Take back the cells of connections whose last reference was dropped on another thread.
    cdef Cell *cell
    cdef Cell *following
    pthread_mutex_lock(&worker.mutex)
    cell = worker.orphans
    worker.orphans = NULL
    while cell != NULL:
        following = cell.next
        give(worker, CONNECTION, cell)
        cell = following
    pthread_mutex_unlock(&worker.mutex)
