# Types for the compiler, of the module with this name.

cimport cython

from mailerq.net.readiness cimport Socket as _Socket
from mailerq.turns cimport EndOfTurn as _EndOfTurn


@cython.final
cdef class Stream:
    cdef public Py_ssize_t _placed, _held_back, _spent, _most_spent
    cdef public double _served_since
    cdef public _Socket _socket
    cdef public bint _departing, _taken, _untold, _exhausted, _failed
    cdef public bytes _unsent, _unread
    cdef public _EndOfTurn _end_of_turn
    cdef public int _fd
    cdef public object _local, _remote, _lost, _tls, _incoming, _outgoing
    cdef public object _take, _drainer, tap

    cpdef fileno(self)
    cpdef receive_nowait(self)
    cpdef receive_known(self)
    cpdef _receive_now(self)
    cpdef _receive_tls_now(self)
    cpdef _feed(self, data)
    cpdef _has_records(self)
    cpdef _decrypt(self)
    cpdef _speak(self)
    cpdef interrupt(self, error)
    cpdef wake(self)
    cpdef _look(self)
    cpdef unread(self, data)
    cpdef write(self, data)
    cpdef flush(self)
    cpdef _buffer(self, data)
    cpdef _depart(self, idle)
    cpdef _abort_drain(self, _)
    cpdef _end_drain(self)
    cpdef _lose(self, why)
    cpdef _raise_lost(self)
    cpdef close(self)
    cpdef stray(self)
    cpdef _check_stray(self, error)


cpdef _dial_zone(host, port, local_ip)
cpdef _descriptor(sock)
cpdef address_of(name)
