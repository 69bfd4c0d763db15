# Message ids.
#
# An id of the built-in generator has 32 digits of base 32 (0-9, a-v), most significant first, so
# that ids sort by age:
#
#     milliseconds since 1970   9 digits  (until the year 3084)
#     counter of this thread    8
#     thread of this process    3
#     process                   5
#     machine                   7
#
# The counter never goes back, even if the clock does. It starts at a random number, so a process
# with the process id and the clock of an earlier process does not repeat its ids.

cdef enum:
    ID_SIZE = 32
    ID_TAIL = 15
    ID_LIMIT = 998              # RFC 5322, section 2.1.1: no line is longer
    ID_TEXT_LIMIT = 700         # of an id, so that "Message-ID: <id@hostname>" fits that line

cdef extern from * nogil:
    """
    typedef struct {
        uint64_t epoch;         /* of the process, see below; 0: not set up */
        uint64_t counter;
        int64_t millisecond;
        char time[9];
        char tail[15];          /* thread, process, machine */
    } mq_generator;
    static __thread mq_generator mq_own_generator;
    """
    ctypedef struct Generator "mq_generator":
        uint64_t epoch
        uint64_t counter
        int64_t millisecond
        char *time
        char *tail
    Generator own_generator "mq_own_generator"

cdef uint64_t epoch = 1         # increases in a forked child, which needs a new generator
cdef uint64_t threads = 0
cdef uint64_t machine = 0
cdef char[2048] PAIRS           # the two digits of each number below 1024


cdef void prepare_pairs() noexcept nogil:
    cdef const char *digits = "0123456789abcdefghijklmnopqrstuv"
    cdef int number
    for number in range(1024):
        PAIRS[2 * number] = digits[number >> 5]
        PAIRS[2 * number + 1] = digits[number & 31]


cdef void forked() noexcept nogil:
    global epoch
    epoch += 1


cdef inline void write_digits(char *target, uint64_t number, int digits) noexcept nogil:
    cdef int place = digits
    while place >= 2:
        place -= 2
        memcpy(target + place, PAIRS + 2 * (number & 1023), 2)
        number >>= 10
    if place:
        target[0] = PAIRS[2 * (number & 31) + 1]


cdef void set_up(Generator *generator) noexcept nogil:
    cdef uint64_t random = 0
    if getrandom(&random, sizeof(random), 0) != sizeof(random):
        random = <uint64_t> monotonic() * 2654435761u
    generator.epoch = epoch
    generator.counter = random
    generator.millisecond = -1
    write_digits(generator.tail, add(&threads, 1), 3)
    write_digits(generator.tail + 3, getpid(), 5)
    write_digits(generator.tail + 8, machine, 7)


cdef inline void generate_id(char *target) noexcept nogil:
    cdef Generator *generator = &own_generator
    cdef timespec now
    cdef int64_t millisecond
    if generator.epoch != epoch:
        set_up(generator)
    clock_gettime(CLOCK_REALTIME, &now)
    millisecond = <int64_t> now.tv_sec * 1000 + now.tv_nsec // 1000000
    if millisecond != generator.millisecond:
        generator.millisecond = millisecond
        write_digits(generator.time, millisecond, 9)
    generator.counter += 1
    memcpy(target, generator.time, 9)
    write_digits(target + 9, generator.counter, 8)
    memcpy(target + 17, generator.tail, ID_TAIL)


cdef struct IdCall:
    Table *table
    char *buffer
    size_t size


cdef void call_id_function(void *argument) noexcept nogil:
    cdef IdCall *request = <IdCall *> argument
    request.size = request.table.id_function(request.buffer, request.table.id_size)


cdef const char *id_problem(const char *text, size_t size) noexcept nogil:
    # Return why an id cannot be the left side of a Message-ID, or NULL. The left side is
    # dot-atom-text (RFC 5322, section 3.6.4).
    cdef size_t index
    if size > ID_TEXT_LIMIT:
        return "wrote more than 700 bytes"
    for index in range(size):
        if not 0x21 <= text[index] <= 0x7e:
            return "wrote bytes that are not printable ASCII"
        if strchr('()<>[]:;@,"\\', text[index]) != NULL:
            return 'wrote one of ()<>[]:;@,"\\'
        if text[index] == 46 and (index == 0 or index + 1 == size or text[index + 1] == 46):
            return "wrote a dot at an end or beside another dot"
    return NULL


cdef size_t plugin_id(Table *table, char *buffer) noexcept nogil:
    # Get an id from the plugin; return its size. If the id cannot be used, log that and return 0.
    cdef IdCall request
    cdef char[300] text
    cdef const char *problem = NULL
    request.table = table
    request.buffer = buffer
    request.size = 0
    text[0] = 0
    cdef Mark *mark = set_mark(table.plugin[table.id_owner].name, "mq_message_id")
    cdef bint thrown = mq_guard(call_id_function, &request, text, sizeof(text))
    clear_mark(mark)
    if thrown:
        problem = "threw a C++ exception: "
    elif request.size == 0:
        problem = "returned 0"
    elif request.size > table.id_size:
        problem = "returned more than the size of the buffer"
    else:
        problem = id_problem(buffer, request.size)
    if problem == NULL:
        return request.size
    snprintf(buffer, ID_LIMIT, "mq_message_id %s%s; the message gets a default id",
             problem, <char *> text)
    append_line(MQ_WARN, table.plugin[table.id_owner].name, buffer)
    return 0


def generate_ids(uint64_t count):
    """Make `count` ids in C and return the last one, for benches/dispatch.py."""
    cdef char[ID_SIZE] text
    cdef uint64_t index
    with nogil:
        for index in range(count):
            generate_id(text)
    return text[:ID_SIZE].decode()
