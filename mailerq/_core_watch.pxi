# Who stands still: threads that need nothing of Python's.
#
# Python cannot say why it stands still. So the `Watch` of a watchdog is a thread of its own, which
# looks at the marks, at the workers, and at when Python last said that it runs; and the *deadline*
# is another one, which sleeps until a signal asks the process to end, and ends it when it does not
# do so by itself. Both write(2) their lines, see "faults".

cdef enum:
    WATCHED = 256               # workers at most
    HURRY = 1000000000          # nanoseconds from a second signal to the end
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

cdef int64_t pulse = 0          # when Python last ran, 0: nobody looks after that


# What the watch has seen of a worker: since when it is in the same crossing.
cdef struct Seen:
    Worker *worker
    uint64_t crossing
    int64_t since
    int64_t patience

cdef struct Watching:
    int stop                    # an eventfd
    int64_t patience            # nanoseconds
    int64_t late                # how late Python may be before the next line
    bint busy                   # Python's own watchdog looks after the workers
    Seen seen[WATCHED]

cdef struct Deadline:
    int wakeup                  # an eventfd, or -1: there is none
    int parent                  # a socket; its end is a request to stop. Or -1
    int64_t seconds             # nanoseconds, in fact
    int64_t asked               # when the process was first asked to end; 0: never
    int64_t again               # and the second time
    int number                  # the signal, 0: the parent has gone

cdef Deadline deadline
deadline.wakeup = -1


cdef void say_since(Said *line, const char *plugin, const char *function,
                    int64_t nanoseconds) noexcept nogil:
    say_place(line, plugin, function)
    say(line, " for ")
    say_seconds(line, nanoseconds)


cdef void say_places(Said *line, int64_t now) noexcept nogil:
    # All plugins that are being called.
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
        if now - mark.since < (mark.patience if mark.patience else watching.patience):
            continue
        mark.patience = 2 * (now - mark.since)
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
    # Note what each worker is in. With a line: add those that have been in it for too long.
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
                seen.patience = watching.patience
            elif now - seen.since >= seen.patience and line != NULL:
                say(line, ", " if found else "")
                say_since(line, name_of(worker, plugin), FUNCTIONS[worker.running_event],
                          now - seen.since)
                seen.patience = 2 * (now - seen.since)
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
        if late < watching.patience:
            watching.late = watching.patience
        say(&line, "a worker has stood still in ")
        if look_at_workers(watching, now, NULL if watching.busy else &line):
            end_line(&line)


cdef void *watch_main(void *argument) noexcept nogil:
    cdef Watching *watching = <Watching *> argument
    cdef pollfd stop
    # A quarter of what is noticed, between 10 ms and a second.
    cdef int64_t pause = watching.patience // 4 // MILLISECOND
    pause = 1000 if pause > 1000 else 10 if pause < 10 else pause
    stop.fd = watching.stop
    stop.events = POLLIN
    while poll(&stop, 1, pause) <= 0:
        look(watching)
    return NULL


cdef int start_thread(pthread_t *thread, void *(*function)(void *) noexcept nogil,
                      void *argument) noexcept nogil:
    # Signals are for Python's threads.
    cdef sigset_t every, before
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &before)
    cdef int failed = pthread_create(thread, NULL, function, argument)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return failed


cdef class Watch:
    """Says what stands still for `seconds`: between `start` and `stop`, without Python's lock."""

    cdef Watching *watching
    cdef pthread_t thread

    def start(self, double seconds):
        self.watching = <Watching *> calloc(1, sizeof(Watching))
        if self.watching == NULL:
            raise MemoryError
        self.watching.stop = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        self.watching.patience = self.watching.late = <int64_t> (seconds * 1e9)
        if self.watching.stop < 0 or start_thread(&self.thread, watch_main, self.watching):
            self.free()
            raise OSError("the watch cannot be started")

    def beat(self):
        """Note that Python runs. From the first time on it is missed when it does not."""
        global pulse
        pulse = monotonic()

    def leave_workers(self):
        """Somebody else looks after the workers, while Python runs."""
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
    # From a signal handler as well.
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
    polled[1].fd = deadline.parent      # negative ones are passed over
    polled[1].events = POLLRDHUP
    while True:
        due = -1
        if deadline.asked:
            due = deadline.asked + deadline.seconds
            if deadline.again and deadline.again + HURRY < due:
                due = deadline.again + HURRY
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
    deadline.seconds = <int64_t> (seconds * 1e9)


def set_deadline(double seconds, numbers=(), int parent=-1):
    """End the process `seconds` after it was asked to stop and has not, with status 70.

    It is asked by one of the signals, whose handlers are called as before, or by the end of the
    socket `parent`. After a second signal it has one more second. To be called once, after the
    handlers have been set.
    """
    cdef sigaction_t action
    cdef pthread_t thread
    cdef int number
    deadline.seconds = <int64_t> (seconds * 1e9)
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
