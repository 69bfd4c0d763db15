# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Dispatcher:
    cdef public Py_ssize_t _settling
    cdef public list _unsettled
    cdef public object counters, _live, _outbox, _queues, _send_log, _clock, _plugins, _pool
    cdef public object _settlers, _settled, _consuming, _stopped
    cdef public object _nursery, _say_unread, _say_unwritten, _say_reduced, _say_failure
    cdef public object _misspelt
    cdef object __weakref__

    cpdef statistics(self)
    cpdef _admit(self, lease)
    cpdef _fail_admission(self, lease)
    cpdef _body_problem(self, message)
    cpdef done(self, job, report, connection)
    cpdef give_back(self, job)
    cpdef park(self, job, seconds)
    cpdef expired(self, job)
    cpdef _refuse(self, lease, outcome)
    cpdef _finish(self, lease, message, report, expires, connection)
    cpdef _flush_log(self)
    cpdef _add(self, settlement, connection)
    cpdef _is_possible(self, publication)


cpdef _result(report, attempt, now)
cpdef _copy(properties, body)
cpdef _set_aside(message, error)
cpdef _shown(value)
cpdef _log_line(message, result)
