# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Pool:
    cdef public Py_ssize_t opened_connections, ahead_jobs
    cdef public bint _stopping
    cdef public dict _destinations, _idle, _starved, _held, _connections
    cdef public object _live, worker, _workers, _resolver, _slots, _office, _doubts, _empty
    cdef public object _lookups, _nursery, _aside, _say_own_fault
    cdef public dict _out_of_step

    cpdef _look(self)
    cpdef put(self, job)
    cpdef opened(self, connection)
    cpdef finished(self, connection, job, report, reusable)
    cpdef next_job(self, connection)
    cpdef returned(self, job)
    cpdef withdrawn(self, connection, job)
    cpdef host_failed(self, host)
    cpdef out_of_step(self, connection)
    cpdef cannot_bind(self, local_ip, error)
    cpdef leaving(self, connection)
    cpdef closed(self, connection, job, report)
    cpdef _pump(self, destination)
    cpdef _employ(self, connection, destination)
    cpdef _is_crowded(self, destination)
    cpdef _may_open(self, destination)
    cpdef _open(self, destination)
    cpdef _park_excess(self, destination)
    cpdef _not_opened(self, destination, report)
    cpdef _move(self, job)
    cpdef _feed_starved(self)
    cpdef _forget(self, destination)
    cpdef recall(self)
    cpdef cut(self)


cpdef _load(worker)
