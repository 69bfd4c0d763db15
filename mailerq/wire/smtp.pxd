# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class Reply:
    cdef readonly int code
    cdef readonly str text
    cdef bytes _wire
    cdef object _status


cpdef reply_of(bytes line)
cpdef long_reply_of(bytes data)
