# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Destination:
    cdef public object key, next_due, turns, window
    cdef public dict held
    cdef public bint backlog, reading

    cpdef has_due(self, now)
    cpdef note(self, due, now)
    cpdef begin_read(self)
    cpdef end_read(self, more, next_due)


cpdef wake_all(waiting)
cpdef _wake_each(waiting)
