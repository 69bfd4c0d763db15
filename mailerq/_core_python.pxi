# What plugins.py works with: contexts, connections, and calls that have to be waited for.


cdef class Nothing:
    """The awaitable of an event that has been dealt with and needs no answer. There is one."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


cdef Nothing nothing = Nothing()
NOTHING = nothing


cdef class Context:
    """A worker thread as plugins see it. To be made, used and ended on that thread.

    plugins.py derives from it: `settle` is a coroutine function that finishes a `Call`.
    """

    cdef Worker *worker
    cdef Table *table
    cdef bint ended             # asked instead of worker.open: another context may have it now
    cdef readonly Library library

    def __cinit__(self, Library library, *args, **kwargs):
        self.library = library
        self.table = library.table
        self.worker = open_worker(library.table)
        if self.worker == NULL:
            raise MemoryError

    def __dealloc__(self):
        # Not by the method: when the interpreter ends, the class may have lost it.
        if self.worker != NULL and not self.ended:
            self.ended = True
            shut(self)

    def fileno(self):
        """A descriptor that is readable when `turn` has something to do."""
        return self.worker.wakeup

    def start(self):
        """mq_context_initialize of every plugin; to be awaited."""
        cdef EventCell *event = begin(self, None, CONTEXT_INITIALIZE)
        self.worker.context = event
        self.worker.context_identity = identity_of(event.cell.word)
        return run(self, event, None, None, None)

    def stop(self):
        """mq_context_cleanup of every plugin; to be awaited."""
        return run(self, begin(self, None, CONTEXT_CLEANUP), None, None, None)

    def end(self):
        """Free what belongs to the worker. All handles of it become invalid."""
        if not self.ended:
            self.ended = True
            shut(self)

    def turn(self):
        """Call what is due: timers, watchers, events that were handed back, `on_output`.

        Returns the calls that are finished or are now with another plugin.
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
        """The descriptor of `fileno` is not ours any more: open another."""
        mend_wakeup(self.worker)
        self.stray()

    cdef take_back(self, Call call):
        # A call that was given up has been handed back after all.
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
        """The plugin and the function that the thread is in just now, or None. Any thread."""
        cdef int plugin = self.worker.running_plugin
        if plugin < 0 or not self.worker.open:
            return None
        return self.library.names[plugin], FUNCTIONS[self.worker.running_event].decode()

    @property
    def live(self):
        """How many objects of each kind there are: for tests, which want to see zeros."""
        cdef int own = self.worker.context != NULL
        cdef long *live = self.worker.live
        return {"events": live[EVENT] - own, "connections": live[CONNECTION],
                "messages": live[MESSAGE], "timers": live[TIMER], "watchers": live[WATCHER]}


cdef shut(Context context):
    # Events that were given up and never handed back end here, with what they kept alive.
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
    if context.library is not None:  # the garbage collector may have taken it
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
    # The event is over, and so are all handles of it. The worker keeps that of its own start.
    strip(event)
    if event.connection != NULL:
        event.connection.event = NULL
        event.connection = NULL
    if event != event.worker.context:
        give(event.worker, EVENT, &event.cell)


cdef run(Context context, EventCell *event, Connection connection, object first, object second):
    # The whole chain in one crossing. What is returned is to be awaited; when no plugin had
    # anything to say that is `nothing`, and no object was made.
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
    """An event that was suspended, or that ended in something to tell.

    `task` and `scope` are for the code that waits for it.
    """

    cdef EventCell *event       # NULL when it is closed
    cdef readonly Context context
    cdef readonly Connection connection
    cdef readonly object first
    cdef readonly object second
    cdef readonly bint abandoned    # it was given up
    cdef readonly bint cancelled    # nobody waits for what comes of it
    cdef public object task
    cdef public object scope

    cdef EventCell *open(self) except NULL:
        if self.event == NULL:
            raise RuntimeError("the call is closed")
        return self.event

    @property
    def name(self):
        """The event's name: "rcptto"."""
        return EVENTS[self.open().number]

    @property
    def function(self):
        """The callback's name: "mq_smtp_in_rcptto"."""
        return FUNCTIONS[self.open().number].decode()

    @property
    def finished(self):
        """Whether no plugin has it any more, or it was given up."""
        return self.open().finished

    @property
    def outcome(self):
        return OUTCOMES[self.open().outcome]

    @property
    def plugin(self):
        """The plugin that has it or that the outcome is about; None when that is no plugin."""
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
        """Stop waiting for the plugin. False when it has handed back a moment ago."""
        if not give_up(self.open()):
            return False
        self.detach()
        return True

    def cancel(self):
        """Nobody waits any more: when it is handed back, call no other plugin and close it."""
        if self.event.finished:
            self.close()
        else:
            self.cancelled = self.event.cancelled = self.event.noted = True

    cdef detach(self):
        # The plugin keeps the event, but the connection goes on without it.
        self.abandoned = True
        self.task = self.scope = None
        if self.event.connection != NULL:
            self.event.connection.kept += 1
            self.event.connection.event = NULL
            self.event.connection = NULL

    def close(self):
        """Free the event. One that was given up lives on until a turn finds it handed back."""
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

    Each event method asks the plugins, and what it returns is to be awaited soon, unless it is
    `NOTHING`: then the event is over. It comes to None when the session goes on, or to the `Reject`
    that takes the place of the normal reply. How long a plugin may take counts from the await. When
    nobody listens it costs one test. Only one event of a connection can go on at a time; all on the
    worker's thread.

    The engine sets what `address`, `port`, `helo`, `login` and `tls_…` say of the client. They are
    None, or 0, while unknown, and for an outgoing connection. No event may take longer than until
    `deadline`, but see `plugins.MORE_SECONDS`.
    """

    cdef ConnectionCell *cell
    cdef readonly Context context
    cdef public object on_output
    cdef public double deadline
    cdef bint incoming
    cdef bint closing           # `close` was called, and waits for an event that was given up
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
        # The last reference may go on any thread.
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
        """Whether the client has logged in; plugins set it too."""
        return self.cell.authenticated

    @authenticated.setter
    def authenticated(self, bint value):
        self.cell.authenticated = value

    @property
    def decided(self):
        """Whether a plugin set `authenticated` in the latest event."""
        return self.cell.decided

    @property
    def address(self):
        """The client's IP address, as the engine believes it: behind a proxy the proxy's client."""
        return self.fact(FACT_ADDRESS)

    @address.setter
    def address(self, value):
        self.set_fact(FACT_ADDRESS, value)

    @property
    def port(self):
        """The client's port; 0 when it is unknown."""
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
        """The name that the client has logged in with, or that a proxy gave."""
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
        """The name in the client's certificate, where one was asked for and verified."""
        return self.fact(FACT_TLS_NAME)

    @tls_name.setter
    def tls_name(self, value):
        self.set_fact(FACT_TLS_NAME, value)

    cdef object fact(self, int number):
        cdef Fact *fact = self.cell.facts[number]
        return fact.text[:fact.size].decode("utf-8", "surrogateescape") if fact != NULL else None

    cdef int set_fact(self, int number, object value) except -1:
        # A plugin that keeps an event which was given up may still read what it was given.
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
        """Whether a plugin, or a handler of Python's, wants this event."""
        return self.heard(EVENTS.index(event))

    def closed_by_peer(self):
        """From now on MQ_SmtpSend returns 0."""
        self.cell.closed = True

    def take_output(self):
        """What plugins queued with MQ_SmtpSend since the last call."""
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
        """Queue raw bytes for the peer, as MQ_SmtpSend does; for Python's handlers."""
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
        """mq_smtp_in_connect: accepted, before the banner. A `Reject` replaces the banner."""
        return self.plain(CONNECT)

    def secured(self):
        """mq_smtp_in_secure: the TLS handshake is done. Sets `secure`."""
        self.cell.secure = True
        return self.plain(SECURE)

    def authenticate(self, str login not None, str password not None):
        """mq_smtp_in_authenticate: True or False if a plugin decided, else None, or a `Reject`."""
        return self.text(AUTHENTICATE, login, password)

    def mailfrom(self, str address not None):
        """mq_smtp_in_mailfrom: the address without angle brackets, "" for the null sender."""
        return self.text(MAILFROM, address, None)

    def rcptto(self, str address not None):
        """mq_smtp_in_rcptto: the address without angle brackets."""
        return self.text(RCPTTO, address, None)

    def data(self, mime not None):
        """mq_smtp_in_data: the whole text of the mail, once for a transaction.

        It is bytes, or a memoryview of a large mail in a file, which must have a NUL behind it.
        """
        return self.text(DATA, mime, None)

    def message(self, message not None):
        """mq_smtp_in_message, once for each recipient; edits the `Message` in place."""
        return self.mail(ON_MESSAGE, message, None)

    def out_data(self, message not None, document=None):
        """mq_smtp_out_data: 354 has come. `message` is what this attempt sends, and is edited.

        `document` is the stored message, which MQ_Json shows and edits; by default `message`.
        """
        return self.mail(OUT_DATA, message, message if document is None else document)

    def out_sent(self, message not None, document=None):
        """mq_smtp_out_sent: the final dot is written. Arguments as for `out_data`."""
        return self.mail(OUT_SENT, message, message if document is None else document)

    def close(self):
        """mq_smtp_in_close, after a suspended event of this connection was handed back.

        It waits for such an event until that is given up. When it has been given up, nobody has to
        wait: the event `close` comes later by itself, when the last of them is handed back. The end
        of an outgoing connection is no event.
        """
        self.cell.closed = True
        self.on_output = None  # it is most likely a method of what owns this connection
        if self.cell.event != NULL:
            return self.context.close_later(self, <Call> self.cell.event.call)
        if self.cell.kept:
            self.closing = True
            return nothing
        return self.plain(CLOSE) if self.incoming else nothing


cdef void adopt(Worker *worker) noexcept nogil:
    # Take back the cells of connections whose last reference went on another thread.
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
