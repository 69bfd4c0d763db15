# A file that is mapped into memory, to be read.
#
# mmap.mmap keeps a descriptor of the file, until Python 3.13 in any case: a plugin that keeps large
# mails would use up those that connections need.

cdef extern from "<sys/mman.h>":
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    int madvise(void *, size_t, int)
    int PROT_READ, MAP_SHARED, MADV_DONTNEED
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

    def forget(self):
        """Take no memory for what was looked at; who looks again has it read from the file."""
        madvise(self.start, self.size, MADV_DONTNEED)


# What the allocator keeps.

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    static void mq_keep_little(int own_pages, int at_the_top)
    {
        mallopt(M_MMAP_THRESHOLD, own_pages);
        mallopt(M_TRIM_THRESHOLD, at_the_top);
    }
    #else
    static void mq_keep_little(int own_pages, int at_the_top)
    {
        (void)own_pages;
        (void)at_the_top;
    }
    #endif
    """
    void mq_keep_little(int, int)

cdef enum:
    OWN_PAGES = 1 << 18     # bytes of an object from which on it has pages of its own
    AT_THE_TOP = 1 << 18    # bytes that stay at the end of the heap


def keep_little():
    """Have this process give large objects back to the system as soon as they are gone.

    The GNU C library takes the largest one that it has seen for usual, up to 32 MB: it then grows
    by copying, and twice its size stays with the process. Others are left as they are.
    """
    mq_keep_little(OWN_PAGES, AT_THE_TOP)
