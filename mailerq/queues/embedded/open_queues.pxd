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


cpdef wake_all(waiting)
cpdef _wake_each(waiting)
