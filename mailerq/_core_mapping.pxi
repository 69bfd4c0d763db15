# A file that is mapped into memory, to be read.
#
# mmap.mmap keeps a descriptor of the file, until Python 3.13 in any case: a plugin that keeps large
# mails would use up those that connections need.

cdef extern from "<sys/mman.h>":
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    int PROT_READ, MAP_SHARED
    void *MAP_FAILED


cdef class Mapping:
    """The first `size` bytes of a file, for memoryview(). Raises OSError.

    Its descriptor is not needed any more. The file must not become shorter.
    """

    cdef void *start
    cdef Py_ssize_t size

    def __cinit__(self, int fd, Py_ssize_t size):
        self.start = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0)
        if self.start == MAP_FAILED:
            self.start = NULL
            PyErr_SetFromErrno(OSError)
        self.size = size

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.size)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.start, self.size, 1, flags)
