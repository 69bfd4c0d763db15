# Cells, blocks and pools: the memory behind handles.
#
# A handle is 64 bits, from the top:
#
#     generation 33 | index 20 | plugin 8 | 000
#
# The index names a cell in a block. The generation increases each time the cell goes back to its
# pool. Generation and index are the *identity* of the object. All plugins share the cell of an
# event, and their handles differ only in the plugin. The word of the cell has the same layout, with
# a state instead of the zeros: so "the plugin of this handle has this event, in this state" is one
# comparison of 64 bits, or one compare-and-swap.

cdef enum:
    PLUGIN_SHIFT = 3
    INDEX_SHIFT = 11
    GENERATION_SHIFT = 31
    STATE_MASK = 7
    PLUGIN_MASK = 255
    PLUGIN_LIMIT = 255
    BLOCK_SHIFT = 8             # 256 cells in a block
    BLOCK_CELLS = 256
    BLOCK_LIMIT = 4096          # a million objects at once

cdef uint64_t IDENTITY_MASK = ~<uint64_t> 2047
cdef uint64_t ONE_GENERATION = <uint64_t> 1 << GENERATION_SHIFT

cdef Block[BLOCK_LIMIT] blocks
cdef int blocks_used = 1        # block 0 stays empty, so that no handle is NULL
cdef Worker *workers = NULL     # all workers ever made
cdef pthread_mutex_t registry   # guards the three above; locked only to grow, open and close

cdef extern from * nogil:
    """
    #ifdef MQ_DEBUG
    #include <stdio.h>
    #include <stdlib.h>
    #define mq_check(condition) ((condition) ? (void)0 : \
        (fprintf(stderr, "%s:%d: " #condition "\\n", __FILE__, __LINE__), abort()))
    #else
    #define mq_check(condition) ((void)0)
    #endif
    _Static_assert(sizeof(void *) == 8, "a handle is a pointer and has 64 bits");
    #define mq_load(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define mq_store(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)
    #define mq_swap(place, value) __atomic_exchange_n(place, value, __ATOMIC_ACQ_REL)
    #define mq_replace(place, old, fresh) __sync_bool_compare_and_swap(place, old, fresh)
    """
    void check "mq_check"(bint condition)
    uint64_t load "mq_load"(uint64_t *place)
    void store "mq_store"(uint64_t *place, uint64_t value)
    bint replace "mq_replace"(uint64_t *place, uint64_t old, uint64_t fresh)
    bint replace_int "mq_replace"(int *place, int old, int fresh)
    size_t load_size "mq_load"(size_t *place)
    void store_size "mq_store"(size_t *place, size_t value)
    EventCell *load_event "mq_load"(EventCell **place)
    EventCell *swap_event "mq_swap"(EventCell **place, EventCell *value)
    bint replace_event "mq_replace"(EventCell **place, EventCell *old, EventCell *fresh)
    Line *load_line "mq_load"(Line **place)
    Line *swap_line "mq_swap"(Line **place, Line *value)
    bint replace_line "mq_replace"(Line **place, Line *old, Line *fresh)


cdef inline uint64_t identity_of(uint64_t word) noexcept nogil:
    return word & IDENTITY_MASK


cdef inline int plugin_of(uint64_t word) noexcept nogil:
    return <int> (word >> PLUGIN_SHIFT) & PLUGIN_MASK


cdef inline uint64_t handle_for(uint64_t identity, int plugin) noexcept nogil:
    return identity | <uint64_t> plugin << PLUGIN_SHIFT


cdef inline Block *block_of(uint64_t handle, int kind) noexcept nogil:
    # Return the block of a handle, or NULL if it is not a handle of this kind.
    cdef Block *block = &blocks[(handle >> (INDEX_SHIFT + BLOCK_SHIFT)) & (BLOCK_LIMIT - 1)]
    return block if block.kind == kind and not handle & STATE_MASK else NULL


cdef inline Cell *cell_in(Block *block, uint64_t handle) noexcept nogil:
    return <Cell *> (block.cells + ((handle >> INDEX_SHIFT) & (BLOCK_CELLS - 1)) * block.size)


cdef inline Cell *cell_of(uint64_t handle, int kind) noexcept nogil:
    # Return the cell of a handle, or NULL if the object is gone. The result stays valid only on the
    # thread of the worker or under its mutex.
    cdef Block *block = block_of(handle, kind)
    if block == NULL:
        return NULL
    cdef Cell *cell = cell_in(block, handle)
    return cell if identity_of(load(&cell.word)) == identity_of(handle) else NULL


cdef inline bint at_home(Worker *worker) noexcept nogil:
    return worker.open and pthread_equal(worker.thread, pthread_self())


cdef size_t size_of(int kind) noexcept nogil:
    if kind == EVENT:
        return sizeof(EventCell)
    if kind == CONNECTION:
        return sizeof(ConnectionCell)
    if kind == MESSAGE:
        return sizeof(MessageCell)
    if kind == TIMER:
        return sizeof(TimerCell)
    return sizeof(WatcherCell)


cdef bint grow(Worker *worker, int kind) noexcept nogil:
    # Give the worker another block of free cells: from an ended worker, or a new one.
    global blocks_used
    cdef Block *block = NULL
    cdef int index, place
    cdef Cell *cell
    pthread_mutex_lock(&registry)
    for index in range(1, blocks_used):
        if blocks[index].owner == NULL and blocks[index].kind == kind:
            block = &blocks[index]
            break
    else:
        index = blocks_used
        if index < BLOCK_LIMIT:
            block = &blocks[index]
            block.size = size_of(kind)
            block.cells = <char *> calloc(BLOCK_CELLS, block.size)
            if block.cells == NULL:
                block = NULL
            else:
                for place in range(BLOCK_CELLS):
                    cell = <Cell *> (block.cells + place * block.size)
                    cell.word = ONE_GENERATION | (
                        <uint64_t> (index << BLOCK_SHIFT | place) << INDEX_SHIFT)
                block.kind = kind
                blocks_used += 1
    if block != NULL:
        block.owner = worker
        for place in range(BLOCK_CELLS - 1, -1, -1):
            cell = <Cell *> (block.cells + place * block.size)
            cell.next = worker.pool[kind]
            worker.pool[kind] = cell
    pthread_mutex_unlock(&registry)
    return block != NULL


cdef inline Cell *take(Worker *worker, int kind) noexcept nogil:
    # Take a cell from the pool, or return NULL. The cell keeps its old content.
    check(at_home(worker))
    if worker.pool[kind] == NULL and not grow(worker, kind):
        return NULL
    cdef Cell *cell = worker.pool[kind]
    check(cell.word & STATE_MASK == FREE)
    worker.pool[kind] = cell.next
    worker.live[kind] += 1
    store(&cell.word, identity_of(cell.word) | IDLE)
    return cell


cdef inline void give(Worker *worker, int kind, Cell *cell) noexcept nogil:
    # Return a cell to the pool. All existing handles of the cell become invalid.
    check(at_home(worker))
    check(cell.word & STATE_MASK != FREE)
    store(&cell.word, identity_of(cell.word) + ONE_GENERATION)
    cell.next = worker.pool[kind]
    worker.pool[kind] = cell
    worker.live[kind] -= 1


cdef int copy_far_away(int fd) noexcept nogil:
    # Duplicate a descriptor to a high number. If a plugin closes it, the number is not reused soon,
    # so our writes do not reach a client.
    cdef rlimit limit
    cdef int copy = -1
    if getrlimit(RLIMIT_NOFILE, &limit) == 0:
        copy = fcntl(fd, F_DUPFD_CLOEXEC, <int> min(limit.rlim_cur // 8 * 7, <rlim_t> 60000))
    return copy if copy >= 0 else fcntl(fd, F_DUPFD_CLOEXEC, 0)


cdef bint open_wakeup(Worker *worker) noexcept nogil:
    # Return False, and change nothing, if no descriptor is left.
    cdef int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    cdef int wakeup, spare
    if fd < 0:
        return False
    wakeup = copy_far_away(fd)
    spare = copy_far_away(fd)
    close(fd)
    if wakeup < 0 or spare < 0:
        if wakeup >= 0:
            close(wakeup)
        if spare >= 0:
            close(spare)
        return False
    worker.wakeup = wakeup
    worker.spare = spare
    return True


cdef bint mend_wakeup(Worker *worker) noexcept nogil:
    # A plugin closed the eventfd. Its copy shares the counter, so no wake-up is lost. Return False
    # if no descriptor is left.
    cdef int fd = copy_far_away(worker.spare)
    if fd >= 0:
        worker.wakeup = fd
        return True
    return errno == EBADF and open_wakeup(worker)  # the plugin closed the copy too


cdef Worker *open_worker(Table *table) noexcept nogil:
    # Open a worker for this thread: an ended one, or a new one. Return NULL if memory or file
    # descriptors are exhausted.
    global workers
    cdef Worker *worker
    cdef int count = table.plugins if table.plugins > 0 else 1
    cdef void **data = <void **> calloc(count, sizeof(void *))
    cdef Figures *figures = <Figures *> calloc(count * FIGURES, sizeof(Figures))
    if data == NULL or figures == NULL:
        free(data)
        free(figures)
        return NULL
    pthread_mutex_lock(&registry)
    worker = workers
    while worker != NULL and worker.open:
        worker = worker.next
    if worker == NULL:
        worker = <Worker *> calloc(1, sizeof(Worker))
        if worker != NULL:
            if not open_wakeup(worker):
                free(worker)
                worker = NULL
            else:
                pthread_mutex_init(&worker.mutex, NULL)
                worker.next = workers
                workers = worker
    if worker != NULL:
        worker.table = table
        worker.data = data
        worker.figures = figures
        worker.any_raw = False
        worker.raw_plugin = -1
        worker.touched = False
        worker.running_plugin = -1
        worker.thread = pthread_self()
        worker.open = True
    pthread_mutex_unlock(&registry)
    if worker == NULL:
        free(data)
        free(figures)
    elif table.plugins > 0:
        give_stack(worker)
    return worker


cdef void free_connection(ConnectionCell *cell) noexcept nogil:
    free(cell.data)
    free(cell.output)
    cell.data = NULL
    cell.output = NULL
    cell.output_size = 0
    cell.output_room = 0
    cell.python = NULL
    cell.closed = True
    free_facts(cell)


cdef void free_facts(ConnectionCell *cell) noexcept nogil:
    cdef Fact *fact
    cdef int number
    for number in range(FACT_COUNT):
        free(cell.facts[number])
        cell.facts[number] = NULL
    while cell.former != NULL:
        fact = cell.former
        cell.former = fact.next
        free(fact)


cdef void close_worker(Worker *worker) noexcept nogil:
    # Invalidate all handles of the worker: the floor of each block rises to the highest generation
    # of its cells, and every cell moves there.
    cdef int index, place
    cdef Block *block
    cdef Cell *cell
    take_stack(worker)
    pthread_mutex_lock(&registry)
    pthread_mutex_lock(&worker.mutex)
    for index in range(1, blocks_used):
        block = &blocks[index]
        if block.owner != worker:
            continue
        for place in range(BLOCK_CELLS):
            cell = <Cell *> (block.cells + place * block.size)
            if cell.word & STATE_MASK != FREE:
                store(&cell.word, identity_of(cell.word) + ONE_GENERATION)
            if cell.word >> GENERATION_SHIFT > block.floor:
                block.floor = cell.word >> GENERATION_SHIFT
        for place in range(BLOCK_CELLS):
            cell = <Cell *> (block.cells + place * block.size)
            store(&cell.word, (cell.word & (ONE_GENERATION - 1)) | block.floor << GENERATION_SHIFT)
            if block.kind == CONNECTION:
                free_connection(<ConnectionCell *> cell)
        block.owner = NULL
    worker.open = False
    free(worker.data)
    free(worker.figures)
    worker.data = NULL
    worker.figures = NULL
    memset(worker.pool, 0, sizeof(worker.pool))
    memset(worker.live, 0, sizeof(worker.live))
    worker.outputs = NULL
    worker.orphans = NULL
    worker.context = NULL
    worker.context_identity = 0
    pthread_mutex_unlock(&worker.mutex)
    pthread_mutex_unlock(&registry)


cdef void wake(Worker *worker) noexcept nogil:
    # Make the worker take a turn. The eventfd is never closed, like the worker struct.
    cdef uint64_t one = 1
    if write(worker.wakeup, &one, sizeof(one)) < 0 and errno == EBADF:
        write(worker.spare, &one, sizeof(one))


cdef int64_t monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec
