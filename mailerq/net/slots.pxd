# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Slots:
    cdef public object limit
    cdef public Py_ssize_t used
    cdef public object within, on_release, _lock

    cpdef take(self)
    cpdef release(self)
