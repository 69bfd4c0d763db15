# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class HeaderFields:
    cdef public Py_ssize_t body
    cdef public bint is_whole
    cdef public bytes mail
    cdef public dict _forms, _names, _places
    cdef object __weakref__

    cpdef count(self, name)
    cpdef values(self, name)
    cpdef whole(self, name)
    cpdef relaxed_text(self, names, field)
    cpdef names(self, extra)


cpdef signed_field(field, signature)
cpdef _base64(data)
