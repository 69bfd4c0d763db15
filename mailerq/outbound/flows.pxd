# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Flows:
    cdef public dict live, pauses
    cdef public list _asking
    cdef public bint _many
    cdef public double _counted_until
    cdef public object choice, looks, _dispatcher, _intake, _sites, _openings
    cdef object __weakref__

    cpdef find(self, job, site, wanted=*)
    cpdef forget(self, flow)
    cpdef place_elsewhere(self, job, state=*)
    cpdef resume(self, pause, site)
    cpdef look_at(self, flow, when)
