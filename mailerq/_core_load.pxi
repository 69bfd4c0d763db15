# Loading plugins.

cdef Plugin *opened = NULL      # latest first; never closed and never freed: see safety rule 4
cdef bint promoted = False

ctypedef int (*version_function)() noexcept nogil
ctypedef void (*void_function)() noexcept nogil
ctypedef size_t (*size_function)() noexcept nogil


cdef struct PlainCall:
    void *function
    int result
    size_t size


cdef void call_version(void *argument) noexcept nogil:
    cdef PlainCall *request = <PlainCall *> argument
    request.result = (<version_function> request.function)()


cdef void call_void(void *argument) noexcept nogil:
    (<void_function> (<PlainCall *> argument).function)()


cdef void call_size(void *argument) noexcept nogil:
    cdef PlainCall *request = <PlainCall *> argument
    request.size = (<size_function> request.function)()


cdef int call_guarded(PlainCall *request, void (*caller)(void *) noexcept nogil,
                      const char *plugin, str path, const char *name) except -1:
    # Call a function without arguments, on the main thread. Raise PluginError if it throws.
    cdef char[300] text
    cdef int thrown
    cdef Mark *mark = set_mark(plugin, name)
    with nogil:
        thrown = mq_guard(caller, request, text, sizeof(text))
    over(mark)
    flush_log()
    if thrown:
        what = (<char *> text).decode("utf-8", "replace")
        raise PluginError(f"{path}: a C++ exception came out of {name.decode()}(): {what}")
    return 0


cdef over(Mark *mark):
    # Clear the mark. If the watch has reported the call, log that it has returned.
    if mark != NULL and mark.reported:
        logger.warning("[%s] %s goes on; it took %.1f s", mark.plugin.decode("utf-8", "replace"),
                       mark.function.decode(), (monotonic() - mark.since) / 1e9)
    clear_mark(mark)


cdef promote():
    # Make our symbols global. Python loads extensions with local scope, and the undefined MQ_
    # symbols of a plugin resolve only against global symbols.
    global promoted
    cdef Dl_info info
    if promoted:
        return
    if not dladdr(<void *> MQ_Continue, &info) or dlopen(
            info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL) == NULL:
        raise PluginError(f"the MQ_ functions cannot be offered to plugins: {dl_problem()}")
    promoted = True


cdef str dl_problem():
    cdef const char *text = dlerror()
    return text.decode("utf-8", "replace") if text != NULL else "for an unknown reason"


def unresolved(str path, names):
    """Return the names that neither this program nor the libraries of the plugin define."""
    cdef void *library
    encoded = os_fsencode(path)
    promote()
    library = dlopen(encoded, RTLD_LAZY | RTLD_LOCAL)
    missing = []
    for name in names:
        symbol = name.encode()
        if dlsym(NULL, symbol) == NULL and (library == NULL or dlsym(library, symbol) == NULL):
            missing.append(name)
    return missing


def opened_plugins():
    """Return the file names of all plugins that this process has loaded, latest first."""
    cdef Plugin *plugin = opened
    names = []
    while plugin != NULL:
        names.append(plugin.name.decode("utf-8", "backslashreplace"))
        plugin = plugin.next
    return names


cdef class Library:
    """The loaded plugins of one engine, with their callbacks in one table.

    `paths` are the files in load order. Raises `PluginError`, whose text names the file.
    """

    cdef Table *table
    cdef readonly tuple names
    cdef readonly tuple paths
    cdef readonly dict exports      # by name: the version, and the functions that are called
    cdef readonly object id_owner
    cdef object totals          # figures of workers that have ended
    cdef int initialized        # plugins, from the first one

    def __cinit__(self, paths):
        self.paths = tuple(paths)
        self.names = tuple(path.rpartition("/")[2] for path in self.paths)
        self.totals = {}
        self.exports = {}
        if len(self.paths) > PLUGIN_LIMIT:
            raise PluginError(f"{len(self.paths)} plugins; at most {PLUGIN_LIMIT} can be loaded")
        # Never freed: a foreign thread may look up a name in the table at any time.
        self.table = <Table *> calloc(1, sizeof(Table))
        if self.table == NULL:
            raise MemoryError
        self.table.id_owner = -1
        self.table.plugin = <Plugin **> calloc(len(self.paths) + 1, sizeof(Plugin *))
        for number in range(CHAINS):
            self.table.hooks[number] = <Hook *> calloc(len(self.paths) + 1, sizeof(Hook))
            if self.table.hooks[number] == NULL:
                raise MemoryError
        if self.table.plugin == NULL:
            raise MemoryError
        if self.paths:
            promote()
            catch_faults()
        for path, name in zip(self.paths, self.names):
            self.open(path, name)
        self.ask_id_size()

    cdef open(self, str path, str name):
        global opened
        cdef Table *table = self.table
        cdef Plugin *plugin
        cdef Dl_info info
        cdef Extent extent
        cdef PlainCall version
        cdef Mark *mark
        cdef const char *file
        cdef void *function
        cdef Hook *hook
        cdef int number
        encoded = os_fsencode(path)
        plugin = <Plugin *> calloc(1, sizeof(Plugin))
        if plugin == NULL:
            raise MemoryError
        strncpy(plugin.name, os_fsencode(name), sizeof(plugin.name) - 1)
        # Mark before dlopen: a broken file or a constructor may end the process.
        file = encoded
        mark = set_mark(plugin.name, "dlopen() or a constructor")
        with nogil:
            plugin.library = dlopen(file, RTLD_NOW | RTLD_LOCAL)
        over(mark)
        if plugin.library == NULL:
            raise PluginError(f"{path}: the plugin cannot be opened: {dl_problem()}")
        tell_exits(plugin.library)
        version.function = dlsym(plugin.library, "mq_version")
        if version.function == NULL:
            raise PluginError(f"{path}: not a plugin: it does not export mq_version()")
        if dladdr(version.function, &info):
            plugin.base = info.dli_fbase
        extent.within = <char *> version.function
        if find_extent(&extent):
            plugin.end = extent.end
        plugin.next = opened
        opened = plugin
        call_guarded(&version, call_version, plugin.name, path, "mq_version")
        if not 1 <= version.result <= MQ_API_VERSION:
            raise PluginError(
                f"{path}: the plugin was built for version {version.result} of the plugin "
                f"interface; this mailerq accepts versions 1 to {MQ_API_VERSION}")
        plugin.index = table.plugins
        table.plugin[table.plugins] = plugin
        table.plugins += 1
        for number in range(CHAINS):
            function = dlsym(plugin.library, FUNCTIONS[number])
            if function != NULL:
                hook = &table.hooks[number][table.length[number]]
                hook.function = function
                hook.plugin = plugin.index
                table.length[number] += 1
                table.c_events |= <uint64_t> 1 << number
        self.find_id_functions(plugin, path)
        self.exports[name] = version.result, tuple(
            [each for each in CALLBACKS if dlsym(plugin.library, each.encode()) != NULL])

    cdef find_id_functions(self, Plugin *plugin, str path):
        # The last plugin that exports mq_message_id supplies the ids.
        cdef PlainCall request
        cdef void *function = dlsym(plugin.library, "mq_message_id")
        request.function = dlsym(plugin.library, "mq_message_id_size")
        if request.function == NULL and function == NULL:
            return
        if request.function == NULL or function == NULL:
            present = "mq_message_id" if function != NULL else "mq_message_id_size"
            absent = "mq_message_id_size" if function != NULL else "mq_message_id"
            logger.warning("[%s] exports %s without %s; it is ignored",
                           path.rpartition("/")[2], present, absent)
            return
        self.table.id_owner = plugin.index
        self.table.id_function = <id_function_type> function
        self.id_owner = path.rpartition("/")[2]

    cdef ask_id_size(self):
        # Ask only the plugin that supplies the ids.
        cdef PlainCall request
        if self.table.id_owner < 0:
            return
        cdef Plugin *plugin = self.table.plugin[self.table.id_owner]
        path = self.paths[self.table.id_owner]
        request.function = dlsym(plugin.library, "mq_message_id_size")
        call_guarded(&request, call_size, plugin.name, path, "mq_message_id_size")
        if not 1 <= request.size <= ID_LIMIT:
            raise PluginError(f"{path}: mq_message_id_size() returned {request.size}; "
                              f"message ids have 1 to {ID_LIMIT} bytes")
        self.table.id_size = request.size

    def initialize(self):
        """Call mq_initialize of every plugin that exports it, in load order.

        If one fails, clean up the plugins before it and raise `PluginError`.
        """
        try:
            for index, path in enumerate(self.paths):
                self.call_plain(index, path, b"mq_initialize")
                self.initialized = index + 1
        except PluginError:
            self.cleanup()
            raise

    def cleanup(self):
        """Call mq_cleanup of every initialized plugin, in load order; log failures.

        mq_cleanup is the last call of a plugin. The built-in generator supplies later message ids.
        """
        self.table.id_owner = -1
        count, self.initialized = self.initialized, 0
        for index, path in enumerate(self.paths[:count]):
            try:
                self.call_plain(index, path, b"mq_cleanup")
            except PluginError as error:
                logger.error("%s", error)

    cdef call_plain(self, int index, str path, bytes name):
        cdef PlainCall request
        request.function = dlsym(self.table.plugin[index].library, name)
        if request.function != NULL:
            call_guarded(&request, call_void, self.table.plugin[index].name, path, name)

    def message_id(self):
        """Return a message id of the plugin or of the built-in generator. Any thread."""
        cdef char[ID_LIMIT + 2] buffer
        cdef size_t size = 0
        if self.table.id_owner >= 0:
            with nogil:
                size = plugin_id(self.table, buffer)
            if load_line(&lines) != NULL:
                flush_log()
        if size == 0:
            size = ID_SIZE
            generate_id(buffer)
        return PyUnicode_DecodeASCII(buffer, size, NULL)

    @property
    def id_size(self):
        """The buffer size for ids of the plugin; None if no plugin supplies ids."""
        return self.table.id_size if self.table.id_owner >= 0 else None

    def listens(self, str event):
        """Whether a plugin or a Python handler listens to this event."""
        return bool((self.table.c_events | self.table.python_events) >> EVENTS.index(event) & 1)

    def set_handled(self, str event):
        """Record that Python has a handler for this event."""
        self.table.python_events |= <uint64_t> 1 << EVENTS.index(event)

    def figures(self):
        """Return the figures of `Plugins.statistics`, by plugin and called event."""
        cdef Worker *worker = workers
        totals = {key: list(value) for key, value in self.totals.items()}
        while worker != NULL:
            if worker.open and worker.table == self.table:
                self.add_figures(worker, totals)
            worker = worker.next
        result = {name: {} for name in self.names}
        for number in range(FIGURES):
            for plugin, name in enumerate(self.names):
                if (row := totals.get((number, plugin))) is not None:
                    result[name][EVENTS[number]] = {
                        "calls": row[0], "suspensions": row[1], "rejects": row[2],
                        "timeouts": row[3], "kept": row[5], "kept_bytes": row[6],
                        "seconds": row[4] / 1e9}
        return result

    cdef add_figures(self, Worker *worker, totals):
        cdef Figures *figures
        for number in range(FIGURES):
            for plugin in range(self.table.plugins):
                figures = &worker.figures[number * self.table.plugins + plugin]
                if figures.calls:
                    row = totals.setdefault((number, plugin), [0] * 7)
                    for place, value in enumerate((
                            figures.calls, figures.suspensions, figures.rejects,
                            figures.timeouts, figures.nanoseconds)):
                        row[place] += value
        self.add_kept(worker, totals)

    cdef add_kept(self, Worker *worker, totals):
        # Add the number and the memory of events that were given up and not handed back.
        cdef EventCell *event
        cdef uint64_t word
        pthread_mutex_lock(&worker.mutex)
        event = worker.waiting
        while event != NULL:
            word = load(&event.cell.word)
            if word & STATE_MASK == GIVEN_UP:
                row = totals[event.number, plugin_of(word)]
                row[5] += 1
                row[6] += event.first.size + event.second.size
                if event.message != NULL:
                    row[6] += event.message.mime.size
            event = event.later
        pthread_mutex_unlock(&worker.mutex)
