# The libev loop of a worker, its timers and its watchers.
#
# A helper thread, which never touches Python, runs the loop. The helper waits in the kernel. When
# a watcher is due, the helper wakes the worker and sleeps on a condition until the worker has
# invoked the pending watchers. The helper releases a mutex while it waits, and the worker holds the
# mutex through every call into a plugin, so plugins may start and stop watchers as if the loop ran
# on their thread. (The manual of libev describes this in its section on threads.)

#
# libev aborts the process if it cannot open the descriptor that wakes a loop. So two descriptors
# are reserved before a loop is made: without them there is no loop, and libev gets them if another
# thread takes the last ones meanwhile.

cdef extern from *:
    """
    #include <errno.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/eventfd.h>
    #include <time.h>
    #include <unistd.h>

    static __thread int mq_reserved[2] = {-1, -1};

    static void mq_give_up_reserve(void)
    {
        for (int index = 0; index < 2; index++) {
            if (mq_reserved[index] >= 0)
                close(mq_reserved[index]);
            mq_reserved[index] = -1;
        }
    }

    static int mq_reserve(void)
    {
        for (int index = 0; index < 2; index++)
            mq_reserved[index] = eventfd(0, EFD_CLOEXEC);
        if (mq_reserved[0] >= 0 && mq_reserved[1] >= 0)
            return 1;
        mq_give_up_reserve();
        return 0;
    }

    /* libev calls this before each new attempt, and would abort without it. */
    static void mq_loop_error(const char *message)
    {
        static const struct timespec pause = {.tv_nsec = 10000000};
        if (errno != EMFILE && errno != ENFILE) {
            perror(message);
            abort();
        }
        if (mq_reserved[0] < 0)
            nanosleep(&pause, NULL);    /* yet another thread was faster */
        mq_give_up_reserve();
    }
    """
    int mq_reserve() noexcept nogil
    void mq_give_up_reserve() noexcept nogil
    void mq_loop_error(const char *) noexcept nogil


cdef void loop_release(ev_loop *ev) noexcept nogil:
    pthread_mutex_unlock(&(<Worker *> ev_userdata(ev)).loop.lock)


cdef void loop_acquire(ev_loop *ev) noexcept nogil:
    pthread_mutex_lock(&(<Worker *> ev_userdata(ev)).loop.lock)


cdef void loop_poked(ev_loop *ev, ev_async *poke, int events) noexcept nogil:
    pass


cdef void loop_pending(ev_loop *ev) noexcept nogil:
    # Called by the helper, with the lock held, instead of invoking pending watchers.
    cdef Worker *worker = <Worker *> ev_userdata(ev)
    cdef Loop *loop = worker.loop
    if ev_pending_count(ev) == 1 and ev_is_pending(&loop.poke):
        ev_invoke_pending(ev)
    while ev_pending_count(ev) > 0 and not loop.stopping:
        wake(worker)
        pthread_cond_wait(&loop.invoked, &loop.lock)
    if loop.stopping:
        ev_break(ev, EVBREAK_ALL)


cdef void *loop_main(void *argument) noexcept nogil:
    cdef Loop *loop = (<Worker *> argument).loop
    pthread_mutex_lock(&loop.lock)
    ev_run(loop.ev, 0)
    pthread_mutex_unlock(&loop.lock)
    return NULL


cdef Loop *open_loop(Worker *worker) noexcept nogil:
    # Make the loop and its helper. The worker holds the lock afterwards, as in any crossing.
    cdef Loop *loop = <Loop *> calloc(1, sizeof(Loop))
    if loop == NULL:
        return NULL
    if not mq_reserve():
        free(loop)
        return NULL
    ev_set_syserr_cb(mq_loop_error)
    loop.ev = ev_loop_new(EVFLAG_NOENV)
    if loop.ev == NULL:
        mq_give_up_reserve()
        free(loop)
        return NULL
    pthread_mutex_init(&loop.lock, NULL)
    pthread_cond_init(&loop.invoked, NULL)
    ev_set_userdata(loop.ev, worker)
    ev_set_loop_release_cb(loop.ev, loop_release, loop_acquire)
    ev_set_invoke_pending_cb(loop.ev, loop_pending)
    ev_async_init(&loop.poke, loop_poked)
    ev_async_start(loop.ev, &loop.poke)
    mq_give_up_reserve()
    pthread_mutex_lock(&loop.lock)
    worker.loop = loop
    worker.locked = True
    if start_thread(&loop.helper, loop_main, worker):
        pthread_mutex_unlock(&loop.lock)
        worker.loop = NULL
        worker.locked = False
        ev_loop_destroy(loop.ev)
        free(loop)
        return NULL
    return loop


cdef void close_loop(Worker *worker) noexcept nogil:
    cdef Loop *loop = worker.loop
    if loop == NULL:
        return
    pthread_mutex_lock(&loop.lock)
    loop.stopping = True
    ev_async_send(loop.ev, &loop.poke)
    pthread_cond_signal(&loop.invoked)
    pthread_mutex_unlock(&loop.lock)
    pthread_join(loop.helper, NULL)
    while worker.timers != NULL:
        drop_timer(worker.timers)
    while worker.watchers != NULL:
        drop_watcher(worker.watchers)
    worker.loop = NULL
    ev_loop_destroy(loop.ev)
    free(loop)


cdef inline void enter(Worker *worker) noexcept nogil:
    # Call before calling plugins. Plugins with their own watchers expect the time of the loop to be
    # current.
    check(at_home(worker) and not worker.inside)
    worker.inside = True
    worker.crossings += 1
    if worker.loop != NULL:
        pthread_mutex_lock(&worker.loop.lock)
        worker.locked = True
        if worker.any_raw:
            ev_now_update(worker.loop.ev)
            worker.touched = True


cdef inline void leave(Worker *worker) noexcept nogil:
    # Call after calling plugins. The helper sleeps with an old timeout, so it may need a poke.
    worker.inside = False
    if worker.locked:
        if worker.touched:
            worker.touched = False
            ev_async_send(worker.loop.ev, &worker.loop.poke)
        worker.locked = False
        pthread_mutex_unlock(&worker.loop.lock)


cdef void invoke(void *argument) noexcept nogil:
    ev_invoke_pending(<ev_loop *> argument)


cdef void invoke_pending(Worker *worker) noexcept nogil:
    # Invoke the watchers that are due, and those that become due meanwhile.
    cdef char[300] text
    while ev_pending_count(worker.loop.ev) > 0:
        leave_callback(worker)
        if mq_guard(invoke, worker.loop.ev, text, sizeof(text)):
            report(MQ_WARN, worker, worker.running_plugin,
                   "%s: a C++ exception came out of it: %s", "a timer or watcher", text)
        worker.running_plugin = -1
    pthread_cond_signal(&worker.loop.invoked)


cdef Loop *loop_of(Worker *worker) noexcept nogil:
    # Return the loop, or NULL if it cannot be made or no crossing is running (as in
    # mq_message_id): then the lock is not held.
    if not worker.inside:
        return NULL
    return worker.loop if worker.loop != NULL else open_loop(worker)


cdef Cell *loop_cell(uint64_t handle, int kind, const char *function) noexcept nogil:
    # Return a timer or a watcher, or NULL. An ended timer is not a mistake, so it is not logged.
    cdef Block *block = block_of(handle, kind)
    if block == NULL or block.owner == NULL:
        return NULL
    if not at_home(block.owner) or not block.owner.inside:
        report(MQ_WARN, block.owner, plugin_of(handle), "%s%s; ignored", function,
               " was called on another thread than the worker's")
        return NULL
    return cell_of(handle, kind)


cdef public ev_loop *MQ_ev(MQ_Context *context) noexcept nogil:
    cdef Worker *worker = context_here(context, "MQ_ev")
    cdef Loop *loop = loop_of(worker) if worker != NULL else NULL
    if loop == NULL:
        return NULL
    worker.touched = True
    if not worker.any_raw:
        worker.any_raw = True
        worker.raw_plugin = plugin_of(<uint64_t> context)
        ev_now_update(loop.ev)
    elif worker.raw_plugin != plugin_of(<uint64_t> context):
        worker.raw_plugin = -1
    return loop.ev


cdef Figures *figures_of(Worker *worker, int event, int plugin) noexcept nogil:
    return &worker.figures[event * worker.table.plugins + plugin]


cdef inline void leave_callback(Worker *worker) noexcept nogil:
    # The next callback of the loop may be a watcher that a plugin made itself.
    worker.running_event = RAW_CALL
    worker.running_plugin = worker.raw_plugin


cdef void timer_due(ev_loop *ev, ev_timer *watcher, int events) noexcept nogil:
    cdef TimerCell *timer = <TimerCell *> watcher.data
    cdef Worker *worker = timer.worker
    cdef Figures *figures = figures_of(worker, TIMER_CALL, timer.plugin)
    cdef timer_function callback = timer.callback
    cdef void *data = timer.data
    cdef bint exact = figures.calls < EXACT_CALLS
    cdef int64_t start = time_of(exact)
    figures.calls += 1
    worker.running_plugin = timer.plugin
    worker.running_event = TIMER_CALL
    drop_timer(timer)
    callback(data)
    leave_callback(worker)
    figures.nanoseconds += time_of(exact) - start


cdef void drop_timer(TimerCell *timer) noexcept nogil:
    cdef Worker *worker = timer.worker
    ev_timer_stop(worker.loop.ev, &timer.timer)
    if timer.earlier != NULL:
        timer.earlier.later = timer.later
    else:
        worker.timers = timer.later
    if timer.later != NULL:
        timer.later.earlier = timer.earlier
    give(worker, TIMER, &timer.cell)


cdef void start_timer(TimerCell *timer, float timeout) noexcept nogil:
    cdef ev_loop *ev = timer.worker.loop.ev
    ev_timer_stop(ev, &timer.timer)
    ev_now_update(ev)
    ev_timer_set(&timer.timer, timeout if timeout > 0 else 0, 0)
    ev_timer_start(ev, &timer.timer)
    timer.worker.touched = True


cdef public MQ_Timer *MQ_TimerStart(MQ_Context *context, float timeout,
                                    void (*callback)(void *data) noexcept nogil,
                                    void *data) noexcept nogil:
    cdef Worker *worker = context_here(context, "MQ_TimerStart")
    cdef TimerCell *timer
    cdef int plugin = plugin_of(<uint64_t> context)
    if worker == NULL or callback == NULL or loop_of(worker) == NULL:
        return NULL
    timer = <TimerCell *> take(worker, TIMER)
    if timer == NULL:
        return NULL
    timer.worker = worker
    timer.plugin = plugin
    timer.callback = callback
    timer.data = data
    timer.earlier = NULL
    timer.later = worker.timers
    if worker.timers != NULL:
        worker.timers.earlier = timer
    worker.timers = timer
    ev_timer_init(&timer.timer, timer_due, 0, 0)
    timer.timer.data = timer
    start_timer(timer, timeout)
    return <MQ_Timer *> handle_for(identity_of(timer.cell.word), plugin)


cdef public void MQ_TimerStop(MQ_Timer *timer) noexcept nogil:
    cdef TimerCell *cell = <TimerCell *> loop_cell(<uint64_t> timer, TIMER, "MQ_TimerStop")
    if cell != NULL:
        drop_timer(cell)


cdef public void MQ_TimerReset(MQ_Timer *timer, float timeout) noexcept nogil:
    cdef TimerCell *cell = <TimerCell *> loop_cell(<uint64_t> timer, TIMER, "MQ_TimerReset")
    if cell != NULL:
        start_timer(cell, timeout)


cdef void watcher_due(ev_loop *ev, ev_io *io, int events) noexcept nogil:
    cdef WatcherCell *watcher = <WatcherCell *> io.data
    cdef Worker *worker = watcher.worker
    cdef Figures *figures = figures_of(worker, WATCHER_CALL, watcher.plugin)
    cdef bint exact = figures.calls < EXACT_CALLS
    cdef int64_t start = time_of(exact)
    figures.calls += 1
    worker.running_plugin = watcher.plugin
    worker.running_event = WATCHER_CALL
    watcher.callback(
        <MQ_IOWatcher *> handle_for(identity_of(watcher.cell.word), watcher.plugin),
        watcher.fd, events & (MQ_READ | MQ_WRITE), watcher.data)
    leave_callback(worker)
    figures.nanoseconds += time_of(exact) - start


cdef void drop_watcher(WatcherCell *watcher) noexcept nogil:
    cdef Worker *worker = watcher.worker
    ev_io_stop(worker.loop.ev, &watcher.io)
    worker.touched = True
    if watcher.earlier != NULL:
        watcher.earlier.later = watcher.later
    else:
        worker.watchers = watcher.later
    if watcher.later != NULL:
        watcher.later.earlier = watcher.earlier
    give(worker, WATCHER, &watcher.cell)


cdef public MQ_IOWatcher *MQ_IOWatch(
        MQ_Context *context, int fd, int events,
        void (*callback)(MQ_IOWatcher *watcher, int fd, int events, void *data) noexcept nogil,
        void *data) noexcept nogil:
    cdef Worker *worker = context_here(context, "MQ_IOWatch")
    cdef WatcherCell *watcher
    cdef int plugin = plugin_of(<uint64_t> context)
    if worker == NULL or callback == NULL:
        return NULL
    if not events & (MQ_READ | MQ_WRITE) or fcntl(fd, F_GETFD) < 0:
        report(MQ_WARN, worker, plugin, "%s: %s", "MQ_IOWatch",
               "not an open file descriptor, or neither MQ_READ nor MQ_WRITE")
        return NULL
    if loop_of(worker) == NULL:
        return NULL
    watcher = <WatcherCell *> take(worker, WATCHER)
    if watcher == NULL:
        return NULL
    watcher.worker = worker
    watcher.plugin = plugin
    watcher.fd = fd
    watcher.callback = callback
    watcher.data = data
    watcher.earlier = NULL
    watcher.later = worker.watchers
    if worker.watchers != NULL:
        worker.watchers.earlier = watcher
    worker.watchers = watcher
    ev_io_init(&watcher.io, watcher_due, fd, events & (MQ_READ | MQ_WRITE))
    watcher.io.data = watcher
    ev_io_start(worker.loop.ev, &watcher.io)
    worker.touched = True
    return <MQ_IOWatcher *> handle_for(identity_of(watcher.cell.word), plugin)


cdef public void MQ_IOUnwatch(MQ_IOWatcher *watcher) noexcept nogil:
    cdef WatcherCell *cell = <WatcherCell *> loop_cell(<uint64_t> watcher, WATCHER, "MQ_IOUnwatch")
    if cell != NULL:
        drop_watcher(cell)
