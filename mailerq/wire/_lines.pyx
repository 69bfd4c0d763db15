# cython: language_level=3, boundscheck=False, wraparound=False
"""The bytes of a mail: each is looked at when it comes in and when it leaves, and kept once.

For what lines are like two neighbours at a time are enough, and nothing is kept from one to the next: so the compiler
makes vector instructions of it, which look at 12 GB/s. To take all pairs out of a copy and look for
the rest, the fastest way in Python, needs ten times as long.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.string cimport memcpy, memmove

cdef extern from "Python.h":
    char *start_of "PyBytes_AS_STRING" (PyObject *)
    int _PyBytes_Resize(PyObject **, Py_ssize_t) except -1

cdef enum:
    LONG_COPY = 1 << 18     # bytes from which on a copy goes without Python's lock,
    LONG_LOOK = 1 << 20     # and a look at them
    BARE_NEWLINE = 1
    DOT_AFTER_LF = 2

BARE = BARE_NEWLINE
DOTTED = DOT_AFTER_LF


cdef int neighbours(const unsigned char *mail, Py_ssize_t size) noexcept nogil:
    cdef unsigned char bare = 0
    cdef unsigned char dotted = 0
    cdef Py_ssize_t i
    for i in range(size - 1):
        bare |= (mail[i] == 13) ^ (mail[i + 1] == 10)
        dotted |= (mail[i] == 10) & (mail[i + 1] == 46)
    return (BARE_NEWLINE if bare else 0) | (DOT_AFTER_LF if dotted else 0)


def look(bytes mail not None):
    """Whether a CR or LF is not part of a pair (`BARE`), and a dot stands behind an LF (`DOTTED`).

    The flags of both, added. The first byte has nothing before it, the last one nothing behind it.
    """
    cdef const unsigned char *first = mail
    cdef Py_ssize_t size = len(mail)
    cdef int found
    if size == 0:
        return 0
    if size < LONG_LOOK:
        found = neighbours(first, size)
    else:
        with nogil:
            found = neighbours(first, size)
    if first[0] == 10 or first[size - 1] == 13:
        found |= BARE_NEWLINE
    return found


def is_ascii(bytes mail not None):
    """Whether no byte is above 127; without Python's lock, so a thread may ask it of a long mail."""
    cdef const unsigned char *first = mail
    cdef Py_ssize_t size = len(mail)
    cdef Py_ssize_t i
    cdef unsigned char high = 0
    with nogil:
        for i in range(size):
            high |= first[i]
    return high < 128


cdef class Buffer:
    """Bytes that come piece by piece, and become one object without being there twice.

    It grows where it lies: the system moves the pages of a large one, and room that was not used
    takes none. `room` is how many bytes are expected. Behind the last byte is a NUL.

    `memoryview` shows what is there; while there is a view, nothing can be added or taken, which is
    a BufferError. One thread at a time may change it.
    """

    cdef PyObject *whole   # bytes that nobody else has, or NULL; freed by `take` or __dealloc__
    cdef Py_ssize_t room   # how many of them there are
    cdef Py_ssize_t size   # how many are used
    cdef readonly Py_ssize_t views

    def __cinit__(self, Py_ssize_t room=0):
        self.whole = NULL
        self.room = self.size = self.views = 0
        if room:
            self._make_room(room)

    def __dealloc__(self):
        Py_XDECREF(self.whole)

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.whole == NULL:
            self._make_room(1)
        cdef char *start = start_of(self.whole)
        start[self.size] = 0
        PyBuffer_FillInfo(view, self, start, self.size, not flags & PyBUF_WRITABLE, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.views -= 1

    def add(self, const unsigned char[::1] piece not None):
        """Put it behind what is there."""
        cdef Py_ssize_t count = piece.shape[0]
        cdef char *to
        if not count:
            return
        self._extend(count)
        to = start_of(self.whole) + self.size
        if count < LONG_COPY:
            memcpy(to, &piece[0], count)
        else:
            with nogil:
                memcpy(to, &piece[0], count)
        self.size += count

    def extend(self, Py_ssize_t count):
        """Make it longer by bytes that say nothing yet; a view for writing fills them."""
        self._extend(count)
        self.size += count

    def replace(self, Py_ssize_t count, bytes head not None):
        """Put `head` in the place of the first `count` bytes."""
        cdef Py_ssize_t more = len(head), rest = self.size - count
        cdef char *start
        if not 0 <= count <= self.size:
            raise ValueError("there are not so many bytes")
        if more > count:
            self._extend(more - count, exact=True)
        elif self.views:
            raise BufferError("somebody looks at it")
        if self.whole == NULL:
            return
        start = start_of(self.whole)
        with nogil:
            memmove(start + more, start + count, rest)
        memcpy(start, <const char *> head, more)
        self.size = more + rest

    def take(self):
        """All of it as one object; it is empty then."""
        cdef bytes taken
        if self.views:
            raise BufferError("somebody looks at it")
        if self.whole == NULL:
            return b""
        self._resize(self.size)
        taken = <bytes> self.whole
        Py_DECREF(taken)  # ours; the local has its own
        self.whole = NULL
        self.room = self.size = 0
        return taken

    def clear(self):
        """Forget what is there, and keep the room."""
        if self.views:
            raise BufferError("somebody looks at it")
        self.size = 0

    cdef int _extend(self, Py_ssize_t count, bint exact=False) except -1:
        # Room for more bytes, and some to spare for those behind them.
        cdef Py_ssize_t size = self.size + count
        if count < 0:
            raise ValueError("a negative count")
        if self.views:
            raise BufferError("somebody looks at it")
        if size > self.room:
            self._make_room(size if exact else size + size // 2)
        return 0

    cdef int _make_room(self, Py_ssize_t room) except -1:
        cdef bytes fresh
        if self.whole == NULL:
            fresh = PyBytes_FromStringAndSize(NULL, room)
            Py_INCREF(fresh)
            self.whole = <PyObject *> fresh
            self.room = room
        else:
            self._resize(room)
        return 0

    cdef int _resize(self, Py_ssize_t room) except -1:
        # Where there is no memory for it, all is lost.
        cdef Py_ssize_t size = min(self.size, room)
        if room != self.room:
            self.room = self.size = 0
            _PyBytes_Resize(&self.whole, room)
            self.room, self.size = room, size
        return 0
