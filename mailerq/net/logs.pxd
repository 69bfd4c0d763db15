# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class LogFile:
    cdef public int _file
    cdef public double _checked
    cdef public Py_ssize_t lost_lines
    cdef public object _path, _clock, _opened
    cdef dict _soon
    cdef bint _is_torn
    cdef object __weakref__

    cpdef write(self, text)
    cpdef write_soon(self, text)
    cpdef _write_lines(self, end)
    cpdef _line(self, text)
    cpdef _append(self, bytes lines)
    cpdef move(self, path, file)
    cpdef check_soon(self)
    cpdef close(self)
    cpdef _reopen_if_gone(self)
    cpdef _replace(self, file)


cpdef open_log(path)
cpdef _identity(int file)
