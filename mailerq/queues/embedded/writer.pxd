# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Writer:
    cdef public Py_ssize_t _commits, _messages, _largest
    cdef public double _seconds, _published
    cdef public bint _ended
    cdef public object _store, _feeds, _requests, _thread
    cdef object __weakref__

    cpdef put(self, request)
    cpdef join(self)
    cpdef statistics(self)
    cpdef _reserve(self, inserts, reserved)
    cpdef _hand_out(self, group, reserved, notify)
    cpdef _withdraw(self, reserved)
    cpdef _refuse(self, group, problem)
    cpdef _work(self, works)


cpdef _wake_here(feeds, requests, consumers)
