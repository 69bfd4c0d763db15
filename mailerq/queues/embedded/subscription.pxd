# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Feeds:
    cdef public dict feeds
    cdef public bint fetcher_ends
    cdef public object path, clock, lock, reads, damaged
    cdef object __weakref__

    cpdef now(self)
    cpdef get(self, queue)
    cpdef open(self, queue, prefetch)
    cpdef close(self, consumer)
    cpdef give_back(self, feed, lease)
    cpdef look_again(self, feed)
    cpdef pump(self, feed)
    cpdef set_alarm(self, feed, now)
    cpdef tidy(self, feed)
    cpdef make_ready(self, lease, notify)
    cpdef take(self, consumer)
    cpdef notify(self, consumers)
    cpdef wake(self, consumer)
    cpdef damage(self, problem)
