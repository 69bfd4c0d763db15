# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Pause:
    cdef public object flows, key, line, said, destinations
    cdef public double when
    cdef public int failures
    cdef public long long paused
    cdef public bint asking, has_hosts, patient, reserved, ahead

    cpdef link(self, destination)
    cpdef unlink(self, destination)
    cpdef mail_waits(self, destination)
    cpdef nothing_waits(self, destination)
