# The types of what is in the module of this name, for the compiler.

cimport cython

from mailerq.outbound.jobs cimport Job as _Job


@cython.final
cdef class Flow:
    cdef public Py_ssize_t held, reported, window, sent, ended_messages, _allowed, _failures
    cdef public bint refilling, proven, is_near, takes_along, reserved, patient, down, _ahead
    cdef public double when, _held_until
    cdef public long long paused
    cdef public object site, site_key, local_ip, demands, login, jobs, destinations, ready, sessions
    cdef public object opening, last, history, _dispatcher, _openings, rights, _wanted
    cdef public long long _wanted_number
    cdef public list idle
    cdef object __weakref__

    cpdef add(self, _Job job)
    cpdef link(self, destination)
    cpdef unlink(self, destination)
    cpdef mail_waits(self, destination)
    cpdef nothing_waits(self, destination)
    cpdef next_window(self)
    cpdef next_job(self, session)
    cpdef committed(self)
    cpdef job_ahead(self, session)
    cpdef _pop(self)
    cpdef settle(self, session, _Job job, report)
    cpdef ended(self, session, report)
    cpdef _busy(self, session)
    cpdef _end_try(self, session)
    cpdef resume(self)
    cpdef look(self)
    cpdef pump(self, beside=*)
    cpdef _worth_waking(self, waiting)
    cpdef _wants_session(self, beside)
    cpdef _open(self)
    cpdef _cannot_try(self)
    cpdef _not_let_in(self, report)
