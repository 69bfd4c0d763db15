# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Allowance:
    cdef public long long number
    cdef public bint warming
    cdef public object sending, opening, idle, most
    cdef public object connection_messages, connection_bytes, connection_idle
    cdef object __weakref__


@cython.final
cdef class Limits:
    cdef public long long number, _usual_number
    cdef public bint _granted
    cdef public double _poll, _next
    cdef public dict _rests, _lines, _usual
    cdef public Py_ssize_t _processes
    cdef public object shaping, refusals, days, leases, _calendar, _unlimited, _cells, _turns, _idle
    cdef public object _times, _earlier
    cdef object __weakref__
