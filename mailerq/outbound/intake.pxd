# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Destination:
    cdef public bint waits, listed, taking, news
    cdef public int placing, group, width, window
    cdef public double when
    cdef public tuple flows
    cdef public object key


@cython.final
cdef class Intake:
    cdef public Py_ssize_t leased, _most, _first_window, _least, _few, _direct, _asked, _sorting
    cdef public Py_ssize_t _enough, _sorted
    cdef public double _sort_again
    cdef public bint _serves_soon, _begun, _newest
    cdef public list _early
    cdef public dict _destinations
    cdef public object subscription, dues, _dispatcher, _unsorted, _sorters, _memory_line, _new_line
    cdef public object _say_unread, _next_line, _bare_line
    cdef object __weakref__

    cpdef arrived(self, leases)
    cpdef waiting(self, destination, due)
    cpdef destination(self, key)
    cpdef _mail_waits(self, destination)
    cpdef link(self, destination, flow)
    cpdef _tidy(self, destination)
    cpdef _nothing_waits(self, destination)
    cpdef _widen(self, destination)
    cpdef _memory_for(self, flow)
    cpdef next_ready(self, flow)
    cpdef taken(self, destination)
    cpdef put_back(self, lease)
    cpdef lease_over(self)
    cpdef _took(self, destination, taken)
    cpdef refill(self, flow)
    cpdef _next_takes(self, most)
    cpdef _serve_soon(self)
    cpdef _next_flow(self)
    cpdef _wait_for_memory(self, flow)
    cpdef _room_to_sort(self)
