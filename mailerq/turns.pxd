# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class EndOfTurn:
    cdef public list _callbacks, _after, _last, _next_last
    cdef public object _token, _awake
    cdef public bint _installed, _leaving, _rests

    cpdef call(self, callback)
    cpdef call_after(self, callback)
    cpdef call_last(self, callback)
    cpdef leave(self)
    cpdef _install(self)


@cython.final
cdef class Woken:
    cdef readonly object value

    cpdef unwrap(self)


cpdef woken(value)
cpdef _instrument(end)
