# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Job:
    cdef public object lease, message, plan, flow, is_ascii, made, signing, key, stored
    cdef public Py_ssize_t attempt, priority
    cdef public double since
    cdef public bint to_make
    cdef object __weakref__
