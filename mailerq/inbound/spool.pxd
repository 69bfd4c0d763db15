# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Memory:
    cdef public object limit, used, held, _lock

    cpdef add(self, count)


@cython.final
cdef class Claim:
    cdef public Py_ssize_t _size, _counted
    cdef public object _memory, _turns
    cdef public bint _has_turn

    cpdef end(self)
    cpdef _count(self, size)


@cython.final
cdef class Spool:
    cdef public object failed, _memory, _directory, _limit, _threshold, _file, _buffer
    cdef public Py_ssize_t _written, _counted

    cpdef came(self, size)
    cpdef close(self)


cpdef is_in_file(body)
