# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class Signer:
    cdef public object now, chains, _live, _say_problem, _files, _snapshot, _seen, _file
    cdef public object _lookers, _hashers
    cdef public Signatures _signatures
    cdef public dict _domains, _flights, _pems, _hashes
    cdef public bint _is_active
    cdef object __weakref__

    cpdef known(self, domain)
    cpdef knows(self, wish)
    cpdef keys_of(self, wish)
    cpdef _hash_of(self, mail, start, relaxed, binary, shared)
    cpdef _keep_hash(self, mail, relaxed, made)


@cython.final
cdef class Signatures:
    cdef public double _began, _spent
    cdef public list _waiting
    cdef public bint _is_due, _is_running
    cdef public object _limiter
    cdef object __weakref__
