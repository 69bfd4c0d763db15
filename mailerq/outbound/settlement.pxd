# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Settlements:
    cdef public Py_ssize_t _settling
    cdef public list _unsettled
    cdef public object nursery, send_log, _live, _outbox, _queues, _told, _counters
    cdef public object reports, _next_id, _tls_report_ended
    cdef public object _clock, _lot, _say_unwritten, _say_reduced, _say_failure
    cdef public object _settlers, _settled, _together, _with_bodies
    cdef object __weakref__

    cpdef hold(self, lease, until)
    cpdef _add(self, finished)
    cpdef _is_possible(self, publication)


cpdef _result(report, attempt, now)
cpdef _copy(properties, body)
cpdef _set_aside(message, error)
cpdef _shown(value)
cpdef _log_line(message, result)
