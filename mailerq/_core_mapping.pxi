# A file that is mapped into memory for reading.
#
# mmap.mmap keeps a descriptor of the file (always, before Python 3.13), so plugins that keep large
# mails would use up the descriptors for connections.

cdef extern from "<sys/mman.h>":
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    int PROT_READ, MAP_SHARED
    void *MAP_FAILED


cdef class Mapping:
    """The first `size` bytes of a file, for memoryview(). Raises OSError.

    The descriptor may be closed afterwards. The file must not become shorter.
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
