# The types of what is in the module of this name, for the compiler.

cimport cython

from mailerq.outbound.jobs cimport Job as _Job
from mailerq.outbound.limits cimport Allowance as _Allowance, Limits as _Limits


@cython.final
cdef class Rights:
    cdef public _Limits _limits
    cdef public _Allowance _allowance
    cdef public object _site, _local_ip, waits_to_send, waits_to_open
    cdef public list limited
    cdef public bint rest

    cpdef closed(self)
    cpdef limit_over(self, key)
    cpdef wait_to_open(self, flow, refusal)
    cpdef may_send(self, flow, session, _Job job)
    cpdef may_go_ahead(self, session, _Job job)
    cpdef may_open(self)
    cpdef take(self, flow)
    cpdef give_to(self, session)
    cpdef take_host(self, session, host)
    cpdef give_back_host(self, session)
    cpdef opened(self, session)
    cpdef ended(self, session)
    cpdef contended(self, session)
    cpdef are_over(self, session)
    cpdef may_idle(self, session)
    cpdef busy(self, session)


cpdef _size_of(_Job job)
