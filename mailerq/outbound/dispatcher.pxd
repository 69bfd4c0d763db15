# The types of what is in the module of this name, for the compiler.

cimport cython

from mailerq.outbound.jobs cimport Job as _Job


@cython.final
cdef class Dispatcher:
    cdef public Py_ssize_t max_window, opened_sessions, ahead_jobs, looked_up
    cdef public bint stopping
    cdef public double _next_look, _next_due
    cdef public dict _sessions, _looking_up
    cdef public object queues, worker, openings, flows, limits, stops, counters, history, seeing
    cdef public object policies, tls
    cdef public object now, signer, handed, keeper_of, _say_to_and_fro
    cdef public object _live, _plugins, _misspelt, _sites, _intake, _settlements, _bodies
    cdef public object _some_session, _no_session, _times_changed, _say_own_fault
    cdef public object _storage, _stopped, _life, _nursery, _working, _inliner
    cdef object __weakref__

    cpdef admit(self, lease, wanted=*)
    cpdef send(self, job, wanted=*)
    cpdef judge(self, lease)
    cpdef decide(self, message, double now, double seen)
    cpdef _body_problem(self, message)
    cpdef _is_elsewhere(self, lease, ips)
    cpdef place(self, _Job job, found, wanted=*)
    cpdef _trace_field(self, _Job job)
    cpdef has_expired(self, _Job job)
    cpdef refill(self, flow)
    cpdef start_session(self, session)
    cpdef session_over(self, session)
    cpdef settle(self, _Job job, report, session)
    cpdef put_back(self, _Job job)
    cpdef _gone(self, _Job job)
    cpdef lease_over(self, lease, _Job job)
