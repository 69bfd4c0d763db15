# The log: any thread appends lines without Python's lock, and a worker passes them to `logging`.

cdef enum:
    LINE_LIMIT = 4000           # bytes of one line
    BACKLOG_LIMIT = 10000       # waiting lines; more are counted and dropped

cdef Line *lines = NULL         # newest first
cdef uint64_t backlog = 0
cdef uint64_t dropped = 0

cdef extern from * nogil:
    """
    #define mq_add(place, value) __atomic_add_fetch(place, value, __ATOMIC_RELAXED)
    #define mq_caller() __builtin_extract_return_addr(__builtin_return_address(0))
    """
    uint64_t add "mq_add"(uint64_t *place, int64_t value)
    void *caller "mq_caller"()


cdef void append_line(int priority, const char *plugin, const char *text) noexcept nogil:
    cdef size_t size = strnlen(text, LINE_LIMIT)
    cdef Line *line = NULL
    cdef Line *head
    if add(&backlog, 1) <= BACKLOG_LIMIT:
        line = <Line *> malloc(sizeof(Line) + size)
    if line == NULL:
        add(&backlog, -1)
        add(&dropped, 1)
        return
    line.priority = priority
    line.plugin = plugin
    memcpy(line.text, text, size)
    line.text[size] = 0
    while True:
        head = load_line(&lines)
        line.next = head
        if replace_line(&lines, head, line):
            break
    if head == NULL:
        wake_for_log()


cdef void wake_for_log() noexcept nogil:
    # A thread in a crossing flushes the log afterwards. Workers are never freed, so this needs no
    # lock: waking a worker that has just ended does nothing, and its end flushes the log.
    cdef Worker *worker = workers
    cdef Worker *chosen = NULL
    while worker != NULL:
        if worker.open:
            if at_home(worker) and worker.inside:
                return
            chosen = worker
        worker = worker.next
    if chosen != NULL:
        wake(chosen)


cdef void report(int priority, Worker *worker, int plugin, const char *form,
                 const char *function, const char *detail) noexcept nogil:
    # Log a line about a plugin. The form has two %s: the function and the detail.
    cdef char[500] text
    snprintf(text, sizeof(text), form, function, detail)
    append_line(priority, name_of(worker, plugin), text)


cdef const char *name_of(Worker *worker, int plugin) noexcept nogil:
    if worker != NULL and worker.table != NULL and 0 <= plugin < worker.table.plugins:
        return worker.table.plugin[plugin].name
    return "unknown plugin"


cdef const char *plugin_at(void *address) noexcept nogil:
    # Find the calling plugin: the plugin whose callback runs on this thread, or the plugin whose
    # file contains the address. (The address alone could mislead: the call may have been a jump.)
    cdef Worker *worker = workers
    cdef Dl_info info
    cdef Plugin *plugin
    while worker != NULL:
        if at_home(worker) and worker.running_plugin >= 0:
            return name_of(worker, worker.running_plugin)
        worker = worker.next
    if dladdr(address, &info):
        plugin = opened
        while plugin != NULL:
            if plugin.base == info.dli_fbase:
                return plugin.name
            plugin = plugin.next
    cdef const char *marked = marked_here()
    if marked != NULL:
        return marked
    return "plugin"


cdef public void MQ_Log(int priority, const char *message) noexcept nogil:
    if message != NULL:
        append_line(priority, plugin_at(caller()), message)


def flush_log():
    """Pass the waiting lines to `logging`, oldest first."""
    cdef Line *line = swap_line(&lines, NULL)
    cdef Line *oldest = NULL
    cdef Line *next_line
    cdef uint64_t lost
    while line != NULL:
        next_line = line.next
        line.next = oldest
        oldest = line
        line = next_line
    while oldest != NULL:
        line = oldest
        oldest = line.next
        add(&backlog, -1)
        level = LEVELS.get(line.priority, INFO)
        text = line.text[:].decode("utf-8", "backslashreplace")
        plugin = line.plugin.decode("utf-8", "backslashreplace")
        free(line)
        logger.log(level, "[%s] %s", plugin, text)
    lost = dropped
    if lost:
        add(&dropped, -<int64_t> lost)
        logger.warning("%d log lines of plugins were dropped: they came too fast", lost)
