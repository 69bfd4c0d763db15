# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class Header:
    cdef public Py_ssize_t end, body
    cdef public bint is_whole
    cdef public bytes _mime, _lines
    cdef object __weakref__

    cpdef has(self, name)
    cpdef holds(self, text)


cpdef boundaries(mime)
cpdef has_ascii_header(mime)
cpdef unfold(value)
cpdef remove(mime, fields)
cpdef format_date(now)
cpdef date_field(now)
cpdef message_id_field(id, hostname)
cpdef _clean_id(id)
cpdef _fold(line, words)
