# A file that is mapped into memory for reading.
#
# mmap.mmap keeps a descriptor of the file (always, before Python 3.13), so plugins that keep large
# mails would use up the descriptors for connections.

cdef extern from "<sys/mman.h>":
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    int madvise(void *, size_t, int)
    int PROT_READ, MAP_SHARED, MADV_DONTNEED
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

    def forget(self):
        """Release the memory of pages that were read; the next access reads the file again."""
        madvise(self.start, self.size, MADV_DONTNEED)


# The allocator.

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
    OWN_PAGES = 1 << 18     # bytes from which on an object has pages of its own
    AT_THE_TOP = 1 << 18    # free bytes to keep at the end of the heap


def keep_little():
    """Return the memory of large objects to the system as soon as they are freed.

    By default, the GNU C library adapts its thresholds to the largest object so far, up to 32 MB:
    larger objects then grow by copying, and the process keeps twice their size. With other C
    libraries this does nothing.
    """
    mq_keep_little(OWN_PAGES, AT_THE_TOP)
