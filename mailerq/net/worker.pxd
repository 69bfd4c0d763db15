# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Worker:
    cdef public Py_ssize_t index, load
    cdef public object context, nursery, _token, thread, _stop
    cdef object __weakref__

    cpdef _finish(self)
    cpdef _cancel(self)
