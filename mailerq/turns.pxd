# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class EndOfTurn:
    cdef public list _callbacks
    cdef public object _token
    cdef public bint _installed, _leaving

    cpdef call(self, callback)
    cpdef leave(self)
    cpdef _install(self)


@cython.final
cdef class Woken:
    cdef readonly object value

    cpdef unwrap(self)


cpdef woken(value)
cpdef _instrument(end)
