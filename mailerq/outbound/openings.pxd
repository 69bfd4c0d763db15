# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Openings:
    cdef public object slots, _worker, _line, _new_line, _quick_line, _patient_line, _idle, _turn
    cdef public dict _trying, _site_lines
    cdef public Py_ssize_t messages, _quick, _patient, _reserved
    cdef public bint _newest, _serving, _is_for_new

    cpdef take(self, flow)
    cpdef use_try(self, flow)
    cpdef idle(self, session)
    cpdef busy(self, session)
