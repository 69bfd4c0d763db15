# Threads without Python that report blocked workers and end a process that does not stop.
#
# Python cannot report that it is blocked. So the `Watch` of a watchdog has its own thread, which
# checks the marks, the workers, and the last `beat` of Python. The *deadline* is another thread:
# it sleeps until a signal asks the process to stop, and ends the process if it does not stop in
# time. Both write(2) their lines, see "faults".

cdef enum:
    WATCHED = 256               # workers at most
    LAST_SECOND = 1000000000    # nanoseconds from a second signal to the end
    MILLISECOND = 1000000
    OVERDUE_STATUS = 70         # sysexits.h, EX_SOFTWARE

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN, POLLRDHUP
    int poll(pollfd *, unsigned long, int)

cdef extern from "<unistd.h>" nogil:
    int close_fd "close"(int)

cdef int64_t pulse = 0          # time of the last `beat`; 0: Python is not watched


# The current crossing of a worker, as seen by the watch.
cdef struct Seen:
    Worker *worker
    uint64_t crossing
    int64_t since
    int64_t report_after        # nanoseconds after `since` until the next report

cdef struct Watching:
    int stop                    # an eventfd
    int64_t limit               # nanoseconds until a blocked call is reported
    int64_t late                # nanoseconds until a late `beat` is reported next
    bint busy                   # the watchdog in Python watches the workers
    Seen seen[WATCHED]

cdef struct Deadline:
    int wakeup                  # an eventfd; -1: not set
    int parent                  # a socket whose end is a request to stop; -1: none
    int64_t limit               # nanoseconds from the first request to the end
    int64_t asked               # time of the first request to stop; 0: none
    int64_t again               # time of the second request; 0: none
    int number                  # the signal; 0: the parent has gone

cdef Deadline deadline
deadline.wakeup = -1


cdef void say_since(Said *line, const char *plugin, const char *function,
                    int64_t nanoseconds) noexcept nogil:
    say_place(line, plugin, function)
    say(line, " for ")
    say_seconds(line, nanoseconds)


cdef void say_places(Said *line, int64_t now) noexcept nogil:
    # Add all plugins that are being called.
    cdef Worker *worker = workers
    cdef const char *between = ". It is in "
    cdef int index
    for index in range(MARKS):
        if load(&marks[index].state) == SET:
            say(line, between)
            say_since(line, marks[index].plugin, marks[index].function, now - marks[index].since)
            between = ", "
    while worker != NULL:
        index = worker.running_plugin
        if worker.open and index >= 0:
            say(line, between)
            say_place(line, name_of(worker, index), FUNCTIONS[worker.running_event])
            between = ", "
        worker = worker.next


cdef void look_at_marks(Watching *watching, int64_t now) noexcept nogil:
    cdef Said line
    cdef Mark *mark
    cdef int index
    for index in range(MARKS):
        mark = &marks[index]
        if load(&mark.state) != SET:
            continue
        if now - mark.since < (mark.report_after if mark.report_after else watching.limit):
            continue
        mark.report_after = 2 * (now - mark.since)
        mark.reported = True
        begin_line(&line, "Warning")
        say(&line, "the process has stood still in ")
        say_since(&line, mark.plugin, mark.function, now - mark.since)
        end_line(&line)


cdef Seen *seen_of(Watching *watching, Worker *worker) noexcept nogil:
    cdef int index
    for index in range(WATCHED):
        if watching.seen[index].worker == worker or watching.seen[index].worker == NULL:
            watching.seen[index].worker = worker
            return &watching.seen[index]
    return NULL


cdef bint look_at_workers(Watching *watching, int64_t now, Said *line) noexcept nogil:
    # Record the crossing of each worker. If `line` is set, add the workers that are blocked.
    cdef Worker *worker = workers
    cdef Seen *seen
    cdef int plugin
    cdef bint found = False
    while worker != NULL:
        seen = seen_of(watching, worker)
        if seen != NULL:
            plugin = worker.running_plugin
            if plugin < 0 or not worker.open or seen.crossing != worker.crossings:
                seen.crossing = worker.crossings
                seen.since = now
                seen.report_after = watching.limit
            elif now - seen.since >= seen.report_after and line != NULL:
                say(line, ", " if found else "")
                say_since(line, name_of(worker, plugin), FUNCTIONS[worker.running_event],
                          now - seen.since)
                seen.report_after = 2 * (now - seen.since)
                found = True
        worker = worker.next
    return found


cdef void look(Watching *watching) noexcept nogil:
    cdef Said line
    cdef int64_t now = monotonic()
    cdef int64_t late = now - pulse if pulse else 0
    look_at_marks(watching, now)
    begin_line(&line, "Warning")
    if late >= watching.late:
        watching.late = 2 * late
        say(&line, "Python's lock has been held for ")
        say_seconds(&line, late)
        say_places(&line, now)
        end_line(&line)
        look_at_workers(watching, now, NULL)
    else:
        if late < watching.limit:
            watching.late = watching.limit
        say(&line, "a worker has stood still in ")
        if look_at_workers(watching, now, NULL if watching.busy else &line):
            end_line(&line)


cdef void *watch_main(void *argument) noexcept nogil:
    cdef Watching *watching = <Watching *> argument
    cdef pollfd stop
    # Look four times within the limit, but every 10 ms at most and every second at least.
    cdef int64_t pause = watching.limit // 4 // MILLISECOND
    pause = 1000 if pause > 1000 else 10 if pause < 10 else pause
    stop.fd = watching.stop
    stop.events = POLLIN
    while poll(&stop, 1, pause) <= 0:
        look(watching)
    return NULL


cdef int start_thread(pthread_t *thread, void *(*function)(void *) noexcept nogil,
                      void *argument) noexcept nogil:
    # Block all signals in the thread: Python's threads handle them.
    cdef sigset_t every, before
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &before)
    cdef int failed = pthread_create(thread, NULL, function, argument)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return failed


cdef class Watch:
    """A thread that reports calls blocked for `seconds`, between `start` and `stop`."""

    cdef Watching *watching
    cdef pthread_t thread

    def start(self, double seconds):
        self.watching = <Watching *> calloc(1, sizeof(Watching))
        if self.watching == NULL:
            raise MemoryError
        self.watching.stop = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        self.watching.limit = self.watching.late = <int64_t> (seconds * 1e9)
        if self.watching.stop < 0 or start_thread(&self.thread, watch_main, self.watching):
            self.free()
            raise OSError("the watch cannot be started")

    def beat(self):
        """Record that Python runs. After the first call, a missing beat is reported."""
        global pulse
        pulse = monotonic()

    def leave_workers(self):
        """Report workers only while Python does not run: the caller watches them otherwise."""
        self.watching.busy = True

    def stop(self):
        global pulse
        cdef uint64_t one = 1
        pulse = 0
        if self.watching != NULL:
            with nogil:
                write(self.watching.stop, &one, sizeof(one))
                pthread_join(self.thread, NULL)
            self.free()

    cdef free(self):
        close_fd(self.watching.stop)
        free(self.watching)
        self.watching = NULL

    def __dealloc__(self):
        if self.watching != NULL:
            self.stop()


# The deadline

cdef void ask_to_end(int number) noexcept nogil:
    # Also called in a signal handler.
    cdef int64_t now = monotonic()
    if not deadline.asked:
        deadline.number = number
        deadline.asked = now
    elif not deadline.again:
        deadline.again = now


cdef void on_stop(int number, siginfo_t *info, void *context) noexcept nogil:
    cdef uint64_t one = 1
    cdef int before = errno
    ask_to_end(number)
    write(deadline.wakeup, &one, sizeof(one))
    set_errno(before)
    if former[number].sa_flags & SA_SIGINFO:
        former[number].sa_sigaction(number, info, context)
    elif former[number].sa_handler != SIG_DFL and former[number].sa_handler != SIG_IGN:
        former[number].sa_handler(number)


cdef void *deadline_main(void *argument) noexcept nogil:
    cdef pollfd[2] polled
    cdef uint64_t count
    cdef int64_t due, now
    polled[0].fd = deadline.wakeup
    polled[0].events = POLLIN
    polled[1].fd = deadline.parent      # poll ignores -1
    polled[1].events = POLLRDHUP
    while True:
        due = -1
        if deadline.asked:
            due = deadline.asked + deadline.limit
            if deadline.again and deadline.again + LAST_SECOND < due:
                due = deadline.again + LAST_SECOND
            now = monotonic()
            if now >= due:
                break
            due = (due - now) // MILLISECOND + 1
        if poll(polled, 2, INT_MAX if due > INT_MAX else due) <= 0:
            continue
        read(deadline.wakeup, &count, sizeof(count))
        if polled[1].revents:
            ask_to_end(0)
            polled[1].fd = -1
    end_overdue(now)
    return NULL


cdef void end_overdue(int64_t now) noexcept nogil:
    cdef Said line
    begin_line(&line, "Critical")
    say(&line, "asked to stop ")
    say_seconds(&line, now - deadline.asked)
    say(&line, " ago, the process has not ended: it ends now, with status ")
    say_number(&line, OVERDUE_STATUS, 1)
    say_places(&line, now)
    end_line(&line)
    _exit(OVERDUE_STATUS)


def move_deadline(double seconds):
    """Other `seconds` than `set_deadline` was given."""
    deadline.limit = <int64_t> (seconds * 1e9)


def set_deadline(double seconds, numbers=(), int parent=-1):
    """End the process with status 70 if it has not stopped `seconds` after a request to stop.

    A request is one of the signals, whose handlers still run, or the end of the socket `parent`.
    After a second request the process has at most one more second. Call this once, after the
    handlers were installed.
    """
    cdef sigaction_t action
    cdef pthread_t thread
    cdef int number
    deadline.limit = <int64_t> (seconds * 1e9)
    if deadline.wakeup >= 0:
        raise RuntimeError("the deadline is set already")
    deadline.parent = fcntl(parent, F_DUPFD_CLOEXEC, 3) if parent >= 0 else -1
    deadline.wakeup = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    if deadline.wakeup < 0 or start_thread(&thread, deadline_main, NULL):
        raise OSError("the deadline cannot be watched")
    for number in numbers:
        sigaction(number, NULL, &former[number])
        action = former[number]
        action.sa_sigaction = on_stop
        action.sa_flags |= SA_SIGINFO | SA_ONSTACK
        sigaction(number, &action, NULL)
