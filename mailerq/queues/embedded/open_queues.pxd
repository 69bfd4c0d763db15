# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Destination:
    cdef public object key, held, window
    cdef public long long next_due
    cdef public bint backlog, reading
    cdef short _new_turn, _retried_turn, _step

    cpdef hold(self, number)
    cpdef drop(self, number)
    cpdef has_due(self, now)
    cpdef note(self, due, now)
    cpdef begin_read(self)
    cpdef end_read(self, more, next_due)


cdef class Taker:
    cdef public OpenQueue queue
    cdef public Py_ssize_t prefetch, count, bytes
    cdef public bint closed
    cdef public object error, token
    cdef dict __dict__
    cdef object __weakref__


@cython.final
cdef class OpenQueue:
    cdef public object name, barred
    cdef public dict destinations, held, turns
    cdef public set settled
    cdef public list consumers, subscriptions, timers
    cdef public bint is_sorted, reading, complete, scanning, scan_again
    cdef object __weakref__

    cpdef destination(self, key)
    cpdef tidy(self, Destination destination)
    cpdef reserve(self, key, now)

    @cython.locals(taker=Taker)
    cpdef hold(self, lease, Taker taker)

    @cython.locals(taker=Taker, destination=Destination)
    cpdef drop(self, lease)


@cython.final
cdef class OpenQueues:
    cdef public object path, clock, outbox, lock, jobs, damaged
    cdef public dict queues, _to_wake
    cdef public bint reader_ends, look_now, unsorted
    cdef object __weakref__

    cpdef now(self)
    cpdef open(self, name)
    cpdef scan(self, OpenQueue queue)

    @cython.locals(destination=Destination)
    cpdef note(self, OpenQueue queue, key, due, now)
    cpdef note_new(self, OpenQueue queue, insert, now)
    cpdef _tell(self, OpenQueue queue, key, due, now)
    cpdef give(self, lease)

    @cython.locals(queue=OpenQueue, taker=Taker)
    cpdef lease(self, take, checked)
    cpdef pump(self, OpenQueue queue)
    cpdef tidy(self, OpenQueue queue)
    cpdef to_wake(self)


cpdef wake_all(waiting)
cpdef _wake_each(waiting)
