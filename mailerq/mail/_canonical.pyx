# cython: language_level=3, boundscheck=False, wraparound=False
"""Bring the body and the header fields of a mail into canonical form (RFC 6376, section 3.4).

A body is read once, in pieces of any length, and its canonical form goes on to a hash in blocks: so
neither a copy nor the pieces of a large body are kept. Most of a mail is in canonical form already.
Blocks that are, as a comparison of neighbours finds with vector instructions, are copied as a
whole; the rest goes byte by byte.

The form is that of the mail on the wire: a bare CR or LF counts as CRLF, because that is how it is
sent. A mail that is sent byte for byte (BDAT, RFC 3030) is `binary`: only CRLF ends its lines.
"""

from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.buffer cimport PyBUF_READ
from libc.string cimport memcpy

cdef enum:
    CR = 13
    LF = 10
    SPACE = 32
    TAB = 9
    COLON = 58
    CLEAN_BYTES = 256       # bytes that are compared, and copied, at a time
    OUT_BYTES = 1 << 16     # bytes of canonical text that are hashed at a time
    SPARE_BYTES = 8         # what one byte of input can add, apart from empty lines
    LONG_BYTES = 1 << 14    # bytes from which on a piece is read without Python's lock


cdef struct State:
    bint relaxed            # the form
    bint binary
    bint cr                 # the last byte was a CR that may be half of a CRLF
    bint blank              # blanks wait for the text behind them
    bint any                # there was text
    Py_ssize_t newlines     # line ends since the last text


cdef inline bint is_clean(const unsigned char *text, bint relaxed) noexcept nogil:
    # Whether `CLEAN_BYTES` bytes, and the one behind them, may be copied as they are after text.
    cdef unsigned char bad = 0
    cdef unsigned char a, b
    cdef int i
    if relaxed:
        for i in range(CLEAN_BYTES):
            a = text[i]
            b = text[i + 1]
            bad |= (a == CR) ^ (b == LF)
            bad |= (a == LF) & (b == CR)
            bad |= a == TAB
            bad |= (a == SPACE) & ((b == SPACE) | (b == CR) | (b == TAB))
    else:
        for i in range(CLEAN_BYTES):
            a = text[i]
            b = text[i + 1]
            bad |= (a == CR) ^ (b == LF)
            bad |= (a == LF) & (b == CR)
    return not bad


cdef Py_ssize_t convert(
    State *state, const unsigned char *text, Py_ssize_t size, char *out, Py_ssize_t *made
) noexcept nogil:
    # Read `text` until it ends or `out`, of OUT_BYTES + SPARE_BYTES, is full; return what was read.
    cdef State now = state[0]
    cdef Py_ssize_t at = 0, put = 0, end
    cdef unsigned char byte
    while at < size and put + CLEAN_BYTES < OUT_BYTES:
        if (
            now.any and not (now.newlines or now.blank or now.cr)
            and size - at > CLEAN_BYTES and text[at] != LF and is_clean(text + at, now.relaxed)
        ):
            end = at + CLEAN_BYTES
            # Stop after text, so that no state is left. A LF is never bare here.
            while end > at and (
                text[end - 1] == LF or text[end - 1] == CR
                or (now.relaxed and text[end - 1] == SPACE)
            ):
                end -= 1
            if end > at:
                memcpy(out + put, text + at, end - at)
                put += end - at
                at = end
                continue
        end = min(size, at + CLEAN_BYTES)
        while at < end and put < OUT_BYTES:
            byte = text[at]
            if now.cr:
                now.cr = False
                if byte == LF:
                    now.newlines += 1
                    now.blank = False
                    at += 1
                    continue
                if not now.binary:
                    now.newlines += 1
                    now.blank = False
                else:
                    # A bare CR is text. The byte itself is read again.
                    put = flush(&now, out, put)
                    if now.newlines:
                        now.cr = True
                        break
                    out[put] = CR
                    put += 1
                    continue
            if byte == CR:
                now.cr = True
            elif byte == LF and not now.binary:
                now.newlines += 1
                now.blank = False
            elif now.relaxed and (byte == SPACE or byte == TAB):
                now.blank = True
            else:
                put = flush(&now, out, put)
                if now.newlines:
                    break  # more empty lines than room
                out[put] = byte
                put += 1
                while at + 1 < end and put < OUT_BYTES and text[at + 1] > SPACE:
                    at += 1
                    out[put] = text[at]
                    put += 1
            at += 1
    state[0] = now
    made[0] = put
    return at


cdef inline Py_ssize_t flush(State *now, char *out, Py_ssize_t put) noexcept nogil:
    # Put out what text was waited for; `newlines` stays above 0 if `out` is full before.
    while now.newlines and put < OUT_BYTES:
        out[put] = CR
        out[put + 1] = LF
        put += 2
        now.newlines -= 1
    if now.newlines == 0:
        if now.blank:
            out[put] = SPACE
            put += 1
            now.blank = False
        now.any = True
    return put


cdef class Body:
    r"""The canonical form of a body, which `sink`, such as a hash, gets by its method `update`.

    `relaxed` is the form. `binary`: only CRLF ends a line.

    >>> import hashlib
    >>> hash = hashlib.sha256()
    >>> body = Body(hash, relaxed=True)
    >>> body.add(b"a  b \r\n"); body.add(b"\r\n"); body.end()
    >>> hash.digest() == hashlib.sha256(b"a b\r\n").digest()
    True
    """

    cdef State state
    cdef char *out          # freed by __dealloc__
    cdef object update

    def __cinit__(self, sink, *, bint relaxed, bint binary=False):
        self.state = State(relaxed, binary, False, False, False, 0)
        self.update = sink.update
        self.out = <char *> PyMem_Malloc(OUT_BYTES + 2 * SPARE_BYTES)
        if self.out == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.out)

    def add(self, const unsigned char[::1] piece not None):
        """Read a piece of the body."""
        cdef Py_ssize_t size = piece.shape[0], at = 0, made = 0
        cdef const unsigned char *text
        if not size:
            return
        text = &piece[0]
        while at < size:
            if size - at < LONG_BYTES:
                at += convert(&self.state, text + at, size - at, self.out, &made)
            else:
                with nogil:
                    at += convert(&self.state, text + at, size - at, self.out, &made)
            self._put(made)

    def end(self):
        """The body has ended."""
        cdef Py_ssize_t made = 0
        if self.state.cr and self.state.binary:
            # A bare CR at the end is text.
            while self.state.newlines:
                self._put(flush(&self.state, self.out, 0))
            made = flush(&self.state, self.out, 0)
            self.out[made] = CR
            made += 1
        if self.state.any or not self.state.relaxed:
            self.out[made] = CR
            self.out[made + 1] = LF
            made += 2
        self._put(made)

    cdef int _put(self, Py_ssize_t made) except -1:
        if made:
            self.update(PyMemoryView_FromMemory(self.out, made, PyBUF_READ))
        return 0


def relaxed_field(const unsigned char[::1] mail not None, Py_ssize_t start, Py_ssize_t end):
    r"""Return the relaxed form of the field in ``mail[start:end]``, without its line end.

    >>> relaxed_field(b"Subject : a\r\n\tb  c \r\n", 0, 20)
    b'subject:a b c'
    """
    cdef bytes whole
    cdef char *out
    cdef Py_ssize_t at, put = 0, first = 0
    cdef unsigned char byte
    cdef bint blank = False
    if not 0 <= start <= end <= mail.shape[0]:
        raise ValueError("there is no such field")
    whole = PyBytes_FromStringAndSize(NULL, end - start)
    out = PyBytes_AsString(whole)
    for at in range(start, end):
        byte = mail[at]
        if byte == COLON:
            break
        if byte != SPACE and byte != TAB and byte != CR and byte != LF:
            if 65 <= byte <= 90:
                byte += 32
            out[put] = byte
            put += 1
    else:
        at = end
    if at < end:
        out[put] = COLON
        put += 1
        at += 1
    first = put
    while at < end:
        byte = mail[at]
        at += 1
        if byte == CR or byte == LF:
            continue
        if byte == SPACE or byte == TAB:
            blank = put > first
            continue
        if blank:
            out[put] = SPACE
            put += 1
            blank = False
        out[put] = byte
        put += 1
    return whole[:put]


def simple_field(const unsigned char[::1] mail not None, Py_ssize_t start, Py_ssize_t end):
    r"""Return the field in ``mail[start:end]`` as on the wire, without its last line end.

    >>> simple_field(b"Subject: a\n b\r\n", 0, 15)
    b'Subject: a\r\n b'
    """
    cdef bytes field
    if not 0 <= start <= end <= mail.shape[0]:
        raise ValueError("there is no such field")
    field = bytes(mail[start:end])
    if field.endswith(b"\r\n"):
        field = field.removesuffix(b"\r\n")
    elif field.endswith((b"\r", b"\n")):
        field = field[:len(field) - 1]
    if b"\n" in field or b"\r" in field:
        field = field.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return field
