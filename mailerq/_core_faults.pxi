# Faults: the last line of a process that a plugin ends.
#
# What each thread runs is known without a lock: a worker stores the plugin and the event before
# each call, and calls outside of events (loading a file, mq_initialize, mq_message_id) set a
# *mark*. The handlers below read these, build one line on their stack, and write(2) the line to
# standard error and to the targets of the application log. Then the previous signal action runs, so
# core dumps and exit statuses do not change.
#
# exit() runs the functions of atexit(). _exit() runs nothing, so the calls of plugins to _exit()
# are redirected to a function here, which writes the line and calls _exit().
#
# A crash on a thread without a mark is attributed to the plugin whose file contains the
# instruction. Otherwise (a plugin's thread calls abort, for example) the stack is searched for a
# return address in a plugin. A system call reads the stack: a bad pointer must not crash again.

cdef enum:
    MARKS = 64
    SINKS = 8
    SPEAKER_LIMIT = 64
    STACK_SIZE = 1 << 16        # bytes of the stack of the handlers
    SEARCH_STEPS = 64           # parts of a crashed thread's stack to search
    SEARCH_WORDS = 64           # words of each part
    SAID_LIMIT = 1000
    PREFIX_LIMIT = 8

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <link.h>
    #include <sys/uio.h>
    #include <ucontext.h>

    #define mq_set_errno(value) (errno = (value))

    static void *mq_instruction(void *context)
    {
        ucontext_t *saved = context;
    #if defined(__x86_64__)
        return (void *)saved->uc_mcontext.gregs[REG_RIP];
    #elif defined(__aarch64__)
        return (void *)saved->uc_mcontext.pc;
    #else
        (void)saved;
        return 0;
    #endif
    }

    static void *mq_stack(void *context)
    {
        ucontext_t *saved = context;
    #if defined(__x86_64__)
        return (void *)saved->uc_mcontext.gregs[REG_RSP];
    #elif defined(__aarch64__)
        return (void *)saved->uc_mcontext.sp;
    #else
        (void)saved;
        return 0;
    #endif
    }

    struct mq_extent {
        char *within, *start, *end;
    };

    static int mq_match(struct dl_phdr_info *file, size_t size, void *argument)
    {
        struct mq_extent *extent = argument;
        char *start = (char *)-1, *end = 0;
        (void)size;
        for (int number = 0; number < file->dlpi_phnum; ++number) {
            const ElfW(Phdr) *part = &file->dlpi_phdr[number];
            char *place = (char *)file->dlpi_addr + part->p_vaddr;
            if (part->p_type != PT_LOAD) continue;
            if (place < start) start = place;
            if (place + part->p_memsz > end) end = place + part->p_memsz;
        }
        if (extent->within < start || extent->within >= end) return 0;
        extent->start = start;
        extent->end = end;
        return 1;
    }

    static int mq_find_extent(struct mq_extent *extent)
    {
        return dl_iterate_phdr(mq_match, extent);
    }

    /* Make a library that was just loaded call another function instead of `name`. Its slots may
     * already be read-only, so they are written through /proc/self/mem, as by a debugger. */
    static void mq_redirect(void *library, const char *name, void *from, void *to)
    {
        struct link_map *map;
        const char *strings = 0;
        const ElfW(Sym) *symbols = 0;
        const ElfW(Rela) *tables[2] = {0, 0};
        size_t sizes[2] = {0, 0};
        int memory = open("/proc/self/mem", O_WRONLY | O_CLOEXEC);
        if (memory < 0 || dlinfo(library, RTLD_DI_LINKMAP, &map)) goto done;
        for (const ElfW(Dyn) *row = map->l_ld; row->d_tag != DT_NULL; ++row) {
            ElfW(Addr) place = row->d_un.d_ptr;
            if (place < map->l_addr) place += map->l_addr;  /* if the section is read-only */
            if (row->d_tag == DT_STRTAB) strings = (const char *)place;
            if (row->d_tag == DT_SYMTAB) symbols = (const ElfW(Sym) *)place;
            if (row->d_tag == DT_RELA) tables[0] = (const ElfW(Rela) *)place;
            if (row->d_tag == DT_JMPREL) tables[1] = (const ElfW(Rela) *)place;
            if (row->d_tag == DT_RELASZ) sizes[0] = row->d_un.d_val;
            if (row->d_tag == DT_PLTRELSZ) sizes[1] = row->d_un.d_val;
        }
        for (int which = 0; which < 2 && strings && symbols; ++which)
            for (size_t index = 0; tables[which] && index < sizes[which] / sizeof(ElfW(Rela));
                 ++index) {
                const ElfW(Rela) *each = &tables[which][index];
                void **slot = (void **)(map->l_addr + each->r_offset);
                const ElfW(Sym) *symbol = &symbols[ELF64_R_SYM(each->r_info)];
                if (symbol->st_shndx != SHN_UNDEF || strcmp(strings + symbol->st_name, name))
                    continue;
                if (*slot == from && pwrite(memory, &to, sizeof to, (off_t)slot) < 0) goto done;
            }
    done:
        if (memory >= 0) close(memory);
    }
    """
    void set_errno "mq_set_errno"(int value)
    void *instruction_of "mq_instruction"(void *context)
    void *stack_of "mq_stack"(void *context)
    struct Extent "mq_extent":
        char *within
        char *start
        char *end
    void redirect "mq_redirect"(void *library, const char *name, void *ours, void *theirs)
    bint find_extent "mq_find_extent"(Extent *extent)
    struct iovec:
        void *iov_base
        size_t iov_len
    Py_ssize_t process_vm_readv(int, const iovec *, unsigned long, const iovec *, unsigned long,
                                unsigned long)
    int gettid()

cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        int si_code
        void *si_addr
        int si_pid
    ctypedef struct stack_t:
        void *ss_sp
        int ss_flags
        size_t ss_size
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        void (*sa_sigaction)(int, siginfo_t *, void *) noexcept nogil
        sigset_t sa_mask
        int sa_flags
    int sigaction(int, const sigaction_t *, sigaction_t *)
    int sigaltstack(const stack_t *, stack_t *)
    int sigemptyset(sigset_t *)
    int c_raise "raise"(int)
    void (*SIG_DFL)(int) noexcept nogil
    void (*SIG_IGN)(int) noexcept nogil
    int SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SA_SIGINFO, SA_ONSTACK, SS_DISABLE, SI_USER

cdef extern from "<unistd.h>" nogil:
    void _exit(int)

cdef extern from "<stdlib.h>" nogil:
    int atexit(void (*)() noexcept nogil)
    int at_quick_exit(void (*)() noexcept nogil)


# A call into a plugin outside of events.
cdef struct Mark:
    uint64_t state              # FREE_MARK, BEING_SET, SET
    pthread_t thread
    const char *plugin
    const char *function
    int64_t since               # on the monotonic clock
    int64_t report_after        # nanoseconds after `since` until the next report; 0: the default
    c_bool reported

cdef enum:
    FREE_MARK
    BEING_SET
    SET

cdef Mark[MARKS] marks

# A target of last lines: a descriptor, and the prefix that a syslog socket needs.
cdef struct Sink:
    int fd
    char prefix[PREFIX_LIMIT]

cdef Sink[SINKS] sinks
cdef int sinks_used = 0
cdef char[SPEAKER_LIMIT] speaker    # "process 1: ", if there are several

cdef sigaction_t[65] former         # the previous actions, by signal
cdef int crashed = 0
cdef int home = 0                   # the process of the handlers; forks must not report
cdef bint catching = False
cdef char[STACK_SIZE] first_stack   # for the thread that opened the first plugin


cdef Mark *set_mark(const char *plugin, const char *function) noexcept nogil:
    # Return NULL if too many threads are in plugins at once: then this call is not watched.
    cdef Mark *mark
    cdef int index
    for index in range(MARKS):
        mark = &marks[index]
        if load(&mark.state) == FREE_MARK and replace(&mark.state, FREE_MARK, BEING_SET):
            mark.thread = pthread_self()
            mark.plugin = plugin
            mark.function = function
            mark.since = monotonic()
            mark.report_after = 0
            mark.reported = False
            store(&mark.state, SET)
            return mark
    return NULL


cdef void clear_mark(Mark *mark) noexcept nogil:
    if mark != NULL:
        store(&mark.state, FREE_MARK)


cdef const char *marked_here() noexcept nogil:
    # Return the plugin that this thread is in outside of events, or NULL.
    cdef const char *plugin = NULL
    cdef const char *function
    find_mark(&plugin, &function)
    return plugin


cdef bint find_mark(const char **plugin, const char **function) noexcept nogil:
    cdef int index
    for index in range(MARKS):
        if load(&marks[index].state) == SET and pthread_equal(marks[index].thread, pthread_self()):
            plugin[0] = marks[index].plugin
            function[0] = marks[index].function
            return True
    return False


cdef bint find_running(const char **plugin, const char **function) noexcept nogil:
    # Find the plugin and function that this thread is in. Return False if there is none, or the
    # plugin is unknown.
    cdef Worker *worker = workers
    cdef int index
    if find_mark(plugin, function):
        return True
    while worker != NULL:
        if at_home(worker):
            index = worker.running_plugin
            function[0] = FUNCTIONS[worker.running_event]
            if 0 <= index < worker.table.plugins:
                plugin[0] = worker.table.plugin[index].name
                return True
            return False
        worker = worker.next
    return False


cdef const char *owner_of(void *address) noexcept nogil:
    # Return the plugin whose file contains an address, or NULL.
    cdef Plugin *plugin = opened
    while plugin != NULL:
        if <char *> plugin.base <= <char *> address < <char *> plugin.end:
            return plugin.name
        plugin = plugin.next
    return NULL


cdef const char *owner_on_stack(char *stack) noexcept nogil:
    # Return the plugin of the innermost address of a plugin on a stack, or NULL.
    cdef void *words[SEARCH_WORDS]
    cdef iovec local, remote
    cdef const char *name
    cdef Py_ssize_t got, step, index
    stack = <char *> (<size_t> stack & ~<size_t> (sizeof(void *) - 1))
    for step in range(SEARCH_STEPS):
        local.iov_base = words
        local.iov_len = remote.iov_len = sizeof(words)
        remote.iov_base = stack + step * sizeof(words)
        got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0)
        if got <= 0:
            return NULL
        for index in range(got // <Py_ssize_t> sizeof(void *)):
            name = owner_of(words[index])
            if name != NULL:
                return name
    return NULL


# A line

cdef struct Said:
    size_t size
    char text[SAID_LIMIT]


cdef void say(Said *line, const char *text) noexcept nogil:
    # Leave out control characters: the name of a file may contain line ends.
    while text[0] and line.size < sizeof(line.text) - 1:
        if not 0 <= text[0] < 32 and text[0] != 127:
            line.text[line.size] = text[0]
            line.size += 1
        text += 1


cdef void say_number(Said *line, uint64_t number, int digits) noexcept nogil:
    cdef char[24] text
    cdef int place = sizeof(text) - 1
    text[place] = 0
    while number or digits > 0:
        place -= 1
        text[place] = 48 + number % 10
        number //= 10
        digits -= 1
    say(line, text + place)


cdef void say_seconds(Said *line, int64_t nanoseconds) noexcept nogil:
    cdef uint64_t tenths = <uint64_t> nanoseconds // 100000000
    say_number(line, tenths // 10, 1)
    say(line, ".")
    say_number(line, tenths % 10, 1)
    say(line, " s")


cdef void say_time(Said *line) noexcept nogil:
    # Add the time in UTC, as in all logs. (strftime may take a lock.)
    cdef timespec now
    cdef uint64_t days, seconds, era, day, year, month
    clock_gettime(CLOCK_REALTIME, &now)
    days = <uint64_t> now.tv_sec // 86400 + 719468      # since the first of March of the year 0
    seconds = <uint64_t> now.tv_sec % 86400
    era = days // 146097                                # 400 years
    day = days % 146097
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153                        # from March
    day -= (153 * month + 2) // 5
    say_number(line, era * 400 + year + (1 if month >= 10 else 0), 4)
    say(line, "-")
    say_number(line, month + 3 if month < 10 else month - 9, 2)
    say(line, "-")
    say_number(line, day + 1, 2)
    say(line, " ")
    say_number(line, seconds // 3600, 2)
    say(line, ":")
    say_number(line, seconds // 60 % 60, 2)
    say(line, ":")
    say_number(line, seconds % 60, 2)


cdef void begin_line(Said *line, const char *level) noexcept nogil:
    line.size = 0
    say(line, "[")
    say(line, level)
    say(line, "] [")
    say_time(line)
    say(line, "] ")
    say(line, speaker)


cdef void end_line(Said *line) noexcept nogil:
    # Use one write for each target, so that lines do not mix.
    cdef char[SAID_LIMIT + PREFIX_LIMIT] text
    cdef size_t length
    cdef int index
    line.text[line.size] = 10
    for index in range(sinks_used):
        length = strnlen(sinks[index].prefix, sizeof(sinks[index].prefix))
        memcpy(text, sinks[index].prefix, length)
        memcpy(text + length, line.text, line.size + 1)
        write(sinks[index].fd, text, length + line.size + 1)


cdef void say_place(Said *line, const char *plugin, const char *function) noexcept nogil:
    say(line, function)
    say(line, " of plugin ")
    say(line, plugin)


cdef void say_suspect(Said *line, const char *plugin) noexcept nogil:
    if plugin != NULL:
        say(line, ", in code of plugin ")
        say(line, plugin)
        say(line, ": a thread of its own, perhaps")


# The ends

cdef const char *signal_name(int number) noexcept nogil:
    if number == SIGSEGV:
        return "SIGSEGV"
    if number == SIGBUS:
        return "SIGBUS"
    if number == SIGFPE:
        return "SIGFPE"
    if number == SIGILL:
        return "SIGILL"
    return "SIGABRT"


cdef bint known_thread() noexcept nogil:
    # Whether this is a worker outside of plugins: then no plugin is running here.
    cdef Worker *worker = workers
    while worker != NULL:
        if at_home(worker):
            return not worker.inside
        worker = worker.next
    return False


cdef void on_fault(int number, siginfo_t *info, void *context) noexcept nogil:
    cdef Said line
    cdef const char *plugin = NULL
    cdef const char *function = NULL
    cdef bint sent = info.si_code == SI_USER and info.si_pid != getpid()
    cdef int before = errno
    # Report only the first crash: the second may be a crash of this function.
    if not sent and replace_int(&crashed, 0, 1):
        begin_line(&line, "Critical")
        say(&line, signal_name(number))
        if find_running(&plugin, &function):
            say(&line, " in ")
            say_place(&line, plugin, function)
        else:
            plugin = owner_of(instruction_of(context))
            if plugin == NULL and not known_thread():
                plugin = owner_on_stack(<char *> stack_of(context))
            say(&line, " outside of callbacks")
            say_suspect(&line, plugin)
        end_line(&line)
    # Let the previous action run. A fault repeats when the instruction executes again. A signal
    # that was sent, as by abort() and kill(2), must be sent again.
    sigaction(number, &former[number], NULL)
    if info.si_code <= 0:
        c_raise(number)
    set_errno(before)


cdef void on_exit_called() noexcept nogil:
    say_exit("exit()")


cdef void on_exit_at_once(int status) noexcept nogil:
    say_exit("_exit()")
    _exit(status)


cdef void say_exit(const char *what) noexcept nogil:
    cdef Said line
    cdef const char *plugin = NULL
    cdef const char *function = NULL
    if getpid() != home or crashed:
        return
    begin_line(&line, "Critical")
    say(&line, what)
    if find_running(&plugin, &function):
        say(&line, " was called in ")
        say_place(&line, plugin, function)
        end_line(&line)
    elif gettid() != home and not known_thread():   # the main thread calls exit() at a normal end
        plugin = owner_on_stack(<char *> &line)
        if plugin != NULL:
            say(&line, " was called outside of callbacks")
            say_suspect(&line, plugin)
            end_line(&line)


cdef void tell_exits(void *library) noexcept nogil:
    # Redirect calls of the plugin itself, not of the libraries that it is linked with.
    redirect(library, "_exit", <void *> _exit, <void *> on_exit_at_once)
    redirect(library, "_Exit", dlsym(NULL, "_Exit"), <void *> on_exit_at_once)


cdef void catch_faults():
    # Install the handlers, once in each process that loads plugins.
    global catching, home, sinks_used
    cdef sigaction_t action
    cdef int index
    cdef int *numbers = [SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT]
    if catching:
        return
    catching = True
    home = getpid()
    if not sinks_used and sys.__stderr__ is not None:
        sinks[0].fd = 2
        sinks_used = 1
    give_stack(NULL)
    for index in range(5):
        memset(&action, 0, sizeof(action))
        action.sa_sigaction = on_fault
        action.sa_flags = SA_SIGINFO | SA_ONSTACK
        sigemptyset(&action.sa_mask)
        sigaction(numbers[index], &action, &former[numbers[index]])
    atexit(on_exit_called)
    at_quick_exit(on_exit_called)


cdef void give_stack(Worker *worker) noexcept nogil:
    # Give the handlers a stack on this thread, because the fault may be a stack overflow. The stack
    # of a worker is kept for its next thread.
    cdef stack_t stack
    if sigaltstack(NULL, &stack) or not stack.ss_flags & SS_DISABLE:
        return
    memset(&stack, 0, sizeof(stack))
    stack.ss_size = STACK_SIZE
    if worker == NULL:
        stack.ss_sp = first_stack
    else:
        if worker.stack == NULL:
            worker.stack = malloc(STACK_SIZE)
        stack.ss_sp = worker.stack
    if stack.ss_sp != NULL:
        sigaltstack(&stack, NULL)


cdef void take_stack(Worker *worker) noexcept nogil:
    cdef stack_t stack
    if worker.stack != NULL and not sigaltstack(NULL, &stack) and stack.ss_sp == worker.stack:
        stack.ss_flags = SS_DISABLE
        sigaltstack(&stack, NULL)


def report_to(places, str who=""):
    """Set the targets of last lines, as ``(descriptor, prefix)``; each line starts with `who`."""
    global sinks_used
    sinks_used = 0
    encoded = who.encode()
    strncpy(speaker, encoded, sizeof(speaker) - 1)
    for fd, prefix in tuple(places)[:SINKS]:
        strncpy(sinks[sinks_used].prefix, <bytes> prefix, sizeof(sinks[0].prefix))
        sinks[sinks_used].fd = fd
        sinks_used += 1
