# Types for the compiler, of the module with this name.

cimport cython

from mailerq.net.readiness cimport Socket as _Socket
from mailerq.turns cimport EndOfTurn as _EndOfTurn


@cython.final
cdef class Stream:
    cdef public Py_ssize_t _placed
    cdef public double _served_since
    cdef public _Socket _socket
    cdef public bint _sending, _departing, _digested
    cdef public bytes _unsent, _unread
    cdef public _EndOfTurn _end_of_turn
    cdef public int _fd
    cdef public object _local, _remote, _lost, _tls, _incoming, _outgoing
    cdef public object _take

    cpdef fileno(self)
    cpdef receive_nowait(self)
    cpdef rouse(self)
    cpdef _look(self)
    cpdef _must_flush(self)
    cpdef send_soon(self, data)
    cpdef _depart_soon(self)
    cpdef unread(self, data)
    cpdef _depart(self, idle)
    cpdef send_nowait(self, data)
    cpdef close(self)
    cpdef stray(self)
    cpdef _check_stray(self, error)
    cpdef _raise_lost(self)
    cpdef _send_unsent(self)
    cpdef _lose(self, why)
    cpdef _take_unsent(self)


cpdef _descriptor(sock)
cpdef address_of(name)
