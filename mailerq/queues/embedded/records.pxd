# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class Insert:
    cdef public object message, queue, destination, properties, body, reference, body_crc
    cdef public long long due, since, id
    cdef public Py_ssize_t size
    cdef public object lane

    cpdef keep_wait(self, long long now)


cpdef prepare(publication, now, outbox)
cpdef checksum(number, queue, body, body_crc, properties)
cpdef proven(row)
cpdef check(row, loaded=*)
cpdef aside(row, reason)
cpdef share(inserts)
