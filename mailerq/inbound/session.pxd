# The types of what is in the module of this name, for the compiler.

cimport cython

from mailerq.net.stream cimport Stream as _Stream
from mailerq.wire.server cimport ServerProtocol as _ServerProtocol


@cython.final
cdef class Session:
    cdef public Py_ssize_t _steps, _bytes, _failures, _failed_logins
    cdef public _ServerProtocol _machine
    cdef public _Stream _stream
    cdef public bint _implicit_tls, _proxied, _relays, _stopping, _expired, _mute
    cdef public bint _interruptible, _waiting, _handshaking, _in_mail, _over
    cdef public double _started, _since, _heard
    cdef public object worker, _services, _terms, _client, _admitted, _plugin, _scope, _spool
    cdef public object _due
    cdef object __weakref__

    cpdef shut_down(self, seconds)
    cpdef is_overdue(self, now, short)
    cpdef expire(self)
    cpdef hurry(self)
    cpdef trace(self)
    cpdef _cut_handshake(self)
    cpdef _say_goodbye(self)
    cpdef _admit(self)
    cpdef _know_client(self)
    cpdef _renew(self)
    cpdef _advance(self)
    cpdef _receive_data(self, data)
    cpdef _wait(self)
    cpdef _failed(self)
    cpdef _log_refusals(self)
    cpdef _objection(self, recipient)
    cpdef _too_often(self)
    cpdef _ask(self, asked, refuse)
    cpdef _answer(self, refusal, refuse)
    cpdef _refuse_sender(self, reply)
    cpdef _refuse_recipient(self, reply)
    cpdef _may_shake_hands(self)
    cpdef _content_came(self)
    cpdef _take_output(self)
    cpdef _send_output(self)


cpdef _endpoint(attributes, name, port_name, known)
