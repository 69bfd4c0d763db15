# The types of what is in the module of this name, for the compiler.

cimport cython

from mailerq.outbound.jobs cimport Job as _Job
from mailerq.outbound.limits cimport Allowance as _Allowance
from mailerq.net.stream cimport Stream as _Stream
from mailerq.wire.client cimport ClientProtocol as _ClientProtocol


@cython.final
cdef class Session:
    cdef public Py_ssize_t messages, body_bytes, limits_number, _unsettled, _replies
    cdef public _ClientProtocol _protocol
    cdef public _Stream _stream
    cdef public bint leaving, is_try, patient, borrowed, was_put_off
    cdef public bint _connecting, _idle, _sending, _begun, _prompt
    cdef public bytes _held
    cdef public set _domains
    cdef public double _seconds, _deadline, _asked, _started, since
    cdef public object flow, worker, remote, _timeout, _life, _scope
    cdef public _Allowance allowance
    cdef public object waits_for, counts, starting, idle_counts, refusal, shuns
    cdef public object _event, _ahead, _body, _waiting, _plugin, _local, _converted, _securing
    cdef public set _clear
    cdef public _Job _job
    cdef object __weakref__

    cpdef wake(self)
    cpdef leave(self)
    cpdef cut(self)
    cpdef check(self, double late)
    cpdef _is_patient(self, double now)
    cpdef settled(self)
    cpdef _send_waiting_body(self, body)
    cpdef is_covered(self)
    cpdef trace(self)
    cpdef _withdraw(self)
    cpdef limit_over(self, key)
    cpdef _may_go_on(self)
    cpdef _is_used_up(self, messages, size)
    cpdef _takes_domain(self, domain)
    cpdef _finish(self, _Job job, outcome)
    cpdef _report(self, outcome)
    cpdef _begin(self, _Job job)
    cpdef _go_ahead(self, body)
    cpdef _output_came(self)
    cpdef _release(self)
    cpdef _heard(self, bytes data)
    cpdef _expect(self, seconds)
