# Events: calling the chain, suspending, handing back.
#
# `advance` calls plugin after plugin, without Python's lock. It returns when the event is finished
# or a plugin has taken it. One atomic step on the word of the cell decides between the two: from
# (plugin, RUNNING) to (plugin, WAITING). The step fails if the plugin has already handed back, on
# any thread. The thread that hands back steps from RUNNING or WAITING to the decision; from WAITING
# it also pushes the event on the list of the worker. So exactly one call hands back each turn of
# each plugin.

cdef enum:
    RESTART_LIMIT = 100
    EXACT_CALLS = 128           # exactly timed calls of a plugin for an event: see `time_of`

ctypedef c_bool (*context_hook)(MQ_Context *) noexcept nogil
ctypedef c_bool (*connection_hook)(MQ_Context *, MQ_SmtpConnection *) noexcept nogil
ctypedef c_bool (*text_hook)(MQ_Context *, MQ_SmtpConnection *, const char *, size_t) noexcept nogil
ctypedef c_bool (*login_hook)(MQ_Context *, MQ_SmtpConnection *, const char *, size_t,
                              const char *, size_t) noexcept nogil
ctypedef c_bool (*message_hook)(MQ_Context *, MQ_SmtpConnection *, MQ_Message *) noexcept nogil

cdef extern from * nogil:
    """
    extern int mq_guard(void (*)(void *), void *, char *, size_t);
    """
    int mq_guard(void (*)(void *) noexcept nogil, void *, char *, size_t)


cdef inline c_bool call(EventCell *event, Hook *hook, uint64_t handle) noexcept nogil:
    cdef MQ_Context *context = <MQ_Context *> handle
    cdef int number = event.number
    if number <= CONTEXT_CLEANUP:
        return (<context_hook> hook.function)(context)
    cdef MQ_SmtpConnection *connection = <MQ_SmtpConnection *> handle_for(
        identity_of(event.connection.cell.word), hook.plugin)
    if MAILFROM <= number <= DATA:
        return (<text_hook> hook.function)(context, connection, event.first.data, event.first.size)
    if event.message != NULL:
        return (<message_hook> hook.function)(
            context, connection,
            <MQ_Message *> handle_for(identity_of(event.message.cell.word), hook.plugin))
    if number == AUTHENTICATE:
        return (<login_hook> hook.function)(context, connection, event.first.data,
                                            event.first.size, event.second.data,
                                            event.second.size)
    return (<connection_hook> hook.function)(context, connection)


cdef inline int64_t time_of(bint exact) noexcept nogil:
    # Return nanoseconds of a clock. Reading the exact clock costs 20 ns. The coarse clock costs
    # 5 ns and ticks every few milliseconds: its times are right for a long call, and on average for
    # many short calls. The first calls are timed exactly, because they are few.
    cdef timespec now
    if exact:
        return monotonic()
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec


cdef c_bool call_timed(EventCell *event, Hook *hook, uint64_t handle,
                       Figures *figures) noexcept nogil:
    cdef int64_t start = time_of(True)
    cdef c_bool taken = call(event, hook, handle)
    figures.nanoseconds += time_of(True) - start
    return taken


cdef void advance(void *argument) noexcept nogil:
    # Call the plugins of an event from its position on, until it is finished or suspended.
    cdef EventCell *event = <EventCell *> argument
    cdef Worker *worker = event.worker
    cdef Table *table = event.table
    cdef Hook *hooks = table.hooks[event.number]
    cdef int length = table.length[event.number]
    cdef int position = event.position
    cdef Figures *row = worker.figures + event.number * table.plugins
    cdef uint64_t identity = identity_of(event.cell.word)
    cdef uint64_t handle
    cdef Figures *figures
    cdef Hook *hook
    cdef int state
    cdef c_bool taken
    cdef int64_t before = time_of(False)
    cdef int64_t now
    worker.running_event = event.number
    while position < length:
        hook = &hooks[position]
        figures = &row[hook.plugin]
        handle = handle_for(identity, hook.plugin)
        store(&event.cell.word, handle | RUNNING)
        worker.running_plugin = hook.plugin
        figures.calls += 1
        if figures.calls <= EXACT_CALLS:
            taken = call_timed(event, hook, handle, figures)
            before = time_of(False)
        else:
            taken = call(event, hook, handle)
            now = time_of(False)
            figures.nanoseconds += now - before
            before = now
        state = <int> (load(&event.cell.word) & STATE_MASK)
        if not taken and state == RUNNING and not event.noted:
            position += 1
            continue
        event.position = position
        if taken and state == RUNNING:
            if suspend(event, handle):
                figures.suspensions += 1
                worker.running_plugin = -1
                return
            state = <int> (load(&event.cell.word) & STATE_MASK)
        elif not taken:
            if state != RUNNING:
                report(MQ_WARN, worker, hook.plugin, "%s handed back and then returned false%s",
                       FUNCTIONS[event.number], "; the hand-back is ignored")
            state = CONTINUED
        if not decide(event, hook.plugin, state):
            worker.running_plugin = -1
            return
        position = event.position
        before = time_of(False)
    worker.running_plugin = -1
    finish(event, UNDECIDED, -1)


cdef bint decide(EventCell *event, int plugin, int decision) noexcept nogil:
    # Apply the decision of the current plugin. Return False if the event is finished.
    event.noted = event.cancelled
    if event.message != NULL and event.message.touched and not read_back(event, plugin):
        finish(event, MISTYPED, plugin)
        return False
    if event.code != 0 and decision != RETRIED:
        event.worker.figures[event.number * event.table.plugins + plugin].rejects += 1
        finish(event, REJECTED, plugin)
        return False
    if decision == COMPLETED or event.cancelled:
        finish(event, DECIDED, plugin)
        return False
    if decision == RETRIED:
        event.code = 0
        event.restarts += 1
        if event.restarts > RESTART_LIMIT:
            finish(event, LOOPED, plugin)
            return False
        event.position = 0
    else:
        event.position += 1
    return True


cdef inline void finish(EventCell *event, int outcome, int plugin) noexcept nogil:
    event.outcome = outcome
    event.culprit = plugin
    event.finished = True
    store(&event.cell.word, identity_of(event.cell.word) | IDLE)


cdef void cross(EventCell *event) noexcept nogil:
    # Call `advance` inside the guard: a C++ exception finishes the event.
    cdef char[300] text
    cdef Worker *worker = event.worker
    worker.current = event
    if mq_guard(advance, event, text, sizeof(text)):
        report(MQ_WARN, worker, worker.running_plugin, "%s: a C++ exception came out of it: %s",
               FUNCTIONS[event.number], text)
        finish(event, THREW, worker.running_plugin)
        worker.running_plugin = -1
    if (not event.finished and event.connection != NULL
            and load_size(&event.connection.output_size) > 0):
        # The session waits now, so it does not check for output itself.
        pthread_mutex_lock(&worker.mutex)
        if announce(event.connection):
            wake(worker)
        pthread_mutex_unlock(&worker.mutex)
    worker.current = NULL


cdef bint suspend(EventCell *event, uint64_t handle) noexcept nogil:
    # Return False if the event has been handed back in the meantime. The event is listed before the
    # atomic step, because afterwards another thread may search for it.
    cdef Worker *worker = event.worker
    pthread_mutex_lock(&worker.mutex)
    event.earlier = NULL
    event.later = worker.waiting
    if worker.waiting != NULL:
        worker.waiting.earlier = event
    worker.waiting = event
    pthread_mutex_unlock(&worker.mutex)
    if replace(&event.cell.word, handle | RUNNING, handle | WAITING):
        return True
    unlist(event)
    return False


cdef void unlist(EventCell *event) noexcept nogil:
    cdef Worker *worker = event.worker
    pthread_mutex_lock(&worker.mutex)
    if event.earlier != NULL:
        event.earlier.later = event.later
    else:
        worker.waiting = event.later
    if event.later != NULL:
        event.later.earlier = event.earlier
    pthread_mutex_unlock(&worker.mutex)


cdef bint try_hand_back(Block *block, uint64_t handle, int decision) noexcept nogil:
    # After the step from WAITING, this thread owns the event until it pushes the event. Its worker
    # stays open as well: a worker ends after its suspended events.
    cdef EventCell *event = <EventCell *> cell_in(block, handle)
    cdef Worker *worker
    cdef EventCell *head
    if replace(&event.cell.word, handle | RUNNING, handle | decision):
        return True
    if not replace(&event.cell.word, handle | WAITING, handle | decision):
        if not replace(&event.cell.word, handle | GIVEN_UP, handle | decision):
            return False
        report(MQ_WARN, event.worker, plugin_of(handle), "%s was handed back too late%s",
               FUNCTIONS[event.number], ", after it had been given up")
    worker = event.worker
    while True:
        head = load_event(&worker.handed)
        event.handed = head
        if replace_event(&worker.handed, head, event):
            break
    # After a crossing the worker checks the list itself.
    if head == NULL and not (at_home(worker) and worker.inside):
        wake(worker)
    return True


cdef void hand_back(MQ_Context *context, int decision, const char *function,
                    void *address) noexcept nogil:
    cdef uint64_t handle = <uint64_t> context
    cdef Block *block = block_of(handle, EVENT)
    cdef Worker *worker
    if block == NULL:
        append_line(MQ_WARN, plugin_at(address), "a hand-back with something that is no context")
        return
    if try_hand_back(block, handle, decision):
        return
    worker = block.owner
    if worker != NULL and worker.context_identity == identity_of(handle):
        hand_back_only(worker, plugin_of(handle), decision, function)
    else:
        report(MQ_WARN, worker, plugin_of(handle), "%s%s", function,
               ": this event is not, or no longer, in the plugin's hands; ignored")


cdef void hand_back_only(Worker *worker, int plugin, int decision,
                         const char *function) noexcept nogil:
    # Hand back the only event of the plugin, with the context of mq_context_initialize.
    cdef EventCell *event
    cdef uint64_t word, only = 0
    cdef int count = 0
    cdef const char *problem = "none of the plugin's events is suspended; ignored"
    if at_home(worker) and worker.current != NULL:
        word = load(&worker.current.cell.word)
        if plugin_of(word) == plugin and word & STATE_MASK == RUNNING:
            only = word
            count = 1
    pthread_mutex_lock(&worker.mutex)
    event = worker.waiting
    while event != NULL:
        word = load(&event.cell.word)
        if plugin_of(word) == plugin and word & STATE_MASK == WAITING:
            only = word
            count += 1
        event = event.later
    pthread_mutex_unlock(&worker.mutex)
    only &= ~<uint64_t> STATE_MASK
    if count == 1 and try_hand_back(block_of(only, EVENT), only, decision):
        return
    if count > 1:
        problem = "more than one of the plugin's events is suspended; nothing is resumed"
    report(MQ_WARN, worker, plugin, "%s with the context of mq_context_initialize: %s", function,
           problem)


cdef public void MQ_Continue(MQ_Context *context) noexcept nogil:
    hand_back(context, CONTINUED, "MQ_Continue", caller())


cdef public void MQ_Complete(MQ_Context *context) noexcept nogil:
    hand_back(context, COMPLETED, "MQ_Complete", caller())


cdef public void MQ_Retry(MQ_Context *context) noexcept nogil:
    hand_back(context, RETRIED, "MQ_Retry", caller())


cdef EventCell *resume(Worker *worker) noexcept nogil:
    # Continue the events that were handed back, oldest first. Return them in a separate list: an
    # event that is suspended again may return to the list of the worker at any moment.
    cdef EventCell *event = swap_event(&worker.handed, NULL)
    cdef EventCell *oldest = NULL
    cdef uint64_t word
    while event != NULL:
        event.moved = oldest
        oldest = event
        event = event.handed
    event = oldest
    while event != NULL:
        unlist(event)
        if not event.finished:
            word = load(&event.cell.word)
            if decide(event, plugin_of(word), <int> (word & STATE_MASK)):
                cross(event)
        event = event.moved
    return oldest


cdef bint give_up(EventCell *event) noexcept nogil:
    # Return False if the event has just been handed back. Otherwise the plugin keeps the event and
    # the memory that it may read, until it hands back or the worker ends.
    cdef uint64_t word = load(&event.cell.word)
    cdef uint64_t handle = word & ~<uint64_t> STATE_MASK
    check(at_home(event.worker))
    if word & STATE_MASK != WAITING or not replace(
            &event.cell.word, handle | WAITING, handle | GIVEN_UP):
        return False
    event.culprit = plugin_of(word)
    event.outcome = TIMED_OUT
    event.finished = True
    event.worker.figures[event.number * event.table.plugins + event.culprit].timeouts += 1
    return True


cdef Worker *context_here(MQ_Context *context, const char *function) noexcept nogil:
    # Return the worker of a context, for a function that is only for the thread of the worker.
    # Otherwise log the call and return NULL. The event of the context may be over.
    cdef uint64_t handle = <uint64_t> context
    cdef Block *block = block_of(handle, EVENT)
    cdef Worker *worker = block.owner if block != NULL else NULL
    cdef const char *problem = NULL
    if block == NULL:
        problem = ": not a context"
    elif (worker == NULL or handle >> GENERATION_SHIFT < block.floor
            or plugin_of(handle) >= worker.table.plugins):
        worker = NULL
        problem = ": the worker of this context has ended"
    elif not at_home(worker):
        problem = " was called on another thread than the worker's"
    if problem != NULL:
        report(MQ_WARN, worker, plugin_of(handle), "%s%s; ignored", function, problem)
        return NULL
    return worker


cdef public void *MQ_ContextData(MQ_Context *context) noexcept nogil:
    cdef Worker *worker = context_here(context, "MQ_ContextData")
    return worker.data[plugin_of(<uint64_t> context)] if worker != NULL else NULL


cdef public void MQ_SetContextData(MQ_Context *context, void *value) noexcept nogil:
    cdef Worker *worker = context_here(context, "MQ_SetContextData")
    if worker != NULL:
        worker.data[plugin_of(<uint64_t> context)] = value
