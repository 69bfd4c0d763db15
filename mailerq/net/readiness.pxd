# Types for the compiler, of the module with this name.

cimport cython


@cython.final
cdef class Socket:
    cdef public Poller _poller
    cdef public bint readable, empties, _wakeable
    cdef public int fd
    cdef public object _reader, _call, _attendant

    cpdef bint may_have_input(self)
    cpdef call_when_writable(self, function)
    cpdef wake(self)
    cpdef interrupt(self, error)
    cpdef alarm(self)
    cpdef stray(self)
    cpdef forget(self)
    cpdef notify(self, events)
    cpdef _begin_to_read(self)
    cpdef _attend(self, attendant)
    cpdef _abort_reader(self, _)


@cython.final
cdef class Poller:
    cdef public dict _sockets
    cdef public object token
    cdef public int _fd, _copy

    cpdef modify(self, socket, events)
    cpdef remove(self, socket)
