# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class Body:
    cdef public Py_ssize_t _waiting
    cdef public bint is_bare, _normalize, _binary, _spilled, _stuffed
    cdef public bytes _held
    cdef public list _pieces
    cdef public object size, _limit, _sink

    cpdef add(self, data)
    cpdef receive_stuffed(self, data)
    cpdef finish(self)
    cpdef discard(self)
    cpdef _decode(self, block)


cpdef _overlap(data)
cpdef in_pairs(text)
cpdef has_bare_newline(body)
cpdef is_binary(body)
