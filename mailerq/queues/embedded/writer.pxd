# The types of what is in the module of this name, for the compiler.

cimport cython

from mailerq.queues.embedded.open_queues cimport OpenQueue as _OpenQueue, OpenQueues as _OpenQueues
from mailerq.queues.embedded.open_queues cimport Taker as _Taker
from mailerq.queues.embedded.records cimport Insert as _Insert


@cython.final
cdef class Request:
    cdef public object inserts, retries, removals, work, task, token, problem
    cdef public bint can_wait, settles
    cdef public Py_ssize_t count, size, rows
    cdef object __weakref__

    cpdef wake(self)


@cython.locals(insert=_Insert)
cpdef Py_ssize_t _size(inserts, retries) except -1


@cython.locals(request=Request)
cpdef _lone(group)


@cython.final
cdef class AfterReply:
    cdef public object taker, token

    cpdef wake(self)


@cython.final
cdef class Writer:
    cdef public Py_ssize_t _commits, _messages, _largest
    cdef public double _seconds, _published
    cdef public bint _ended
    cdef public object _file, _requests, _thread
    cdef public _OpenQueues _queues
    cdef object __weakref__

    cpdef put(self, request)
    cpdef join(self)
    cpdef statistics(self)

    @cython.locals(request=Request, count=Py_ssize_t, size=Py_ssize_t)
    cpdef _fill(self, group, works, timeout=*)

    @cython.locals(request=Request, insert=_Insert, count=Py_ssize_t, settles=bint)
    cpdef _commit(self, group)

    @cython.locals(insert=_Insert, queue=_OpenQueue, taker=_Taker)
    cpdef _reserve(self, inserts, reserved)

    @cython.locals(
        request=Request, insert=_Insert, queue=_OpenQueue, found=_OpenQueue, queues=_OpenQueues
    )
    cpdef _hand_out(self, group, reserved)
    cpdef _withdraw(self, reserved)
    cpdef _refuse(self, group, problem)
    cpdef _work(self, works)
    cpdef _wake(self, group)
