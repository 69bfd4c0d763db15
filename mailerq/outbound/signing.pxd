# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class Signing:
    cdef public list _arc_keys
    cdef public object _fields, _mail, _problem, _seal, _signer, _wish, size
    cdef public tuple keys
    cdef public bint is_prepared
    cdef object __weakref__

    cpdef forget(self)
    cpdef prepare_now(self, job, mail)
    cpdef _set(self, job, fields, found)


cpdef _seals(ready, now)
cpdef _was_passed_on(job)
