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
    if not 0 <= start <= end <= mail.shape[0]:
        raise ValueError("there is no such field")
    if start == end:
        return b""
    whole = PyBytes_FromStringAndSize(NULL, end - start)
    return whole[:put_relaxed(&mail[start], end - start, PyBytes_AsString(whole))]


cdef Py_ssize_t put_relaxed(const unsigned char *text, Py_ssize_t end, char *out) noexcept nogil:
    # Write the relaxed form of a field of `end` bytes, which is not longer; return its length.
    cdef Py_ssize_t at, put = 0, first = 0
    cdef unsigned char byte
    cdef bint blank = False
    for at in range(end):
        byte = text[at]
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
        byte = text[at]
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
    return put


def counted_names(
    dict places not None, tuple always not None, frozenset present not None, Py_ssize_t most
):
    """Return pairs of a name and how often a signature names it, as a tuple.

    The names of `always` stand once more than there are fields, others of `present` as often as
    fields, in the order of these. A name with more than `most` fields stands `most` times:
    verifiers count fields from the bottom up, so one time more would mean a field that is not
    signed.

    >>> places = {b"to": [(0, 1), (1, 2)], b"x": [(2, 3)], b"y": [(3, 4)]}
    >>> counted_names(places, (b"to", b"cc"), frozenset((b"x",)), 100)
    ((b'to', 3), (b'cc', 1), (b'x', 1))
    """
    cdef list names = [], found
    cdef Py_ssize_t count
    for name in always:
        found = places.get(name)
        count = 0 if found is None else len(found)
        names.append((name, count + 1 if count <= most else most))
    for name, found in places.items():
        if name in present:
            names.append((name, min(len(found), most)))
    return tuple(names)


def relaxed_text(
    bytes mail not None, dict places not None, names not None, bytes field not None,
    Py_ssize_t most,
):
    r"""Return the relaxed forms of the fields that a signature names, and of its own field.

    `places` are those of `field_places`, and `names` has pairs of a name and a count. The fields of
    a name are taken from the bottom up, at most `most` and at most as many as the count, each with
    CRLF; the signature's own `field` comes last, without.

    >>> mail = b"To: 1
To: 2
"
    >>> relaxed_text(mail, field_places(mail, 14), ((b"to", 1),), b"X: y", 100)
    b'to:2
x:y'
    """
    cdef const unsigned char *text = <const unsigned char *> PyBytes_AsString(mail)
    cdef Py_ssize_t size = len(field), put = 0, start, end, count, index
    cdef list found
    cdef list taken = []
    cdef bytes name, whole
    cdef char *out
    for name, count in names:
        found = places.get(name)
        if found is None:
            continue
        for index in range(len(found) - 1, len(found) - 1 - min(count, len(found), most), -1):
            place = found[index]
            taken.append(place)
            start, end = place
            if not 0 <= start <= end <= len(mail):
                raise ValueError("there is no such field")
            size += end - start + 2
    whole = PyBytes_FromStringAndSize(NULL, size)
    out = PyBytes_AsString(whole)
    for start, end in taken:
        put += put_relaxed(text + start, end - start, out + put)
        out[put] = CR
        out[put + 1] = LF
        put += 2
    text = <const unsigned char *> PyBytes_AsString(field)
    put += put_relaxed(text, len(field), out + put)
    return whole[:put]


def field_places(bytes mail not None, Py_ssize_t end):
    r"""Return the places of the fields in the header ``mail[:end]``, by name in lower case.

    Places are pairs of offsets, from the top; the fields are those of
    `mailerq.mail.headers.Header.places`. Each byte is read once.

    >>> field_places(b"To: a
 b
TO : c
x
", 22)
    {b'to': [(0, 11), (11, 19)]}
    """
    cdef const unsigned char *text = <const unsigned char *> PyBytes_AsString(mail)
    cdef Py_ssize_t at = 0, start = 0, stop, colon
    cdef dict places = {}
    cdef bytes name = None
    if not 0 <= end <= len(mail):
        raise ValueError("there is no such header")
    while at < end:
        if text[at] != SPACE and text[at] != TAB and text[at] != CR and text[at] != LF:
            if name is not None:
                add_place(places, name, start, at)
                name = None
            stop = at
            while stop < end and 33 <= text[stop] <= 126 and text[stop] != COLON:
                stop += 1
            colon = stop
            while colon < end and (text[colon] == SPACE or text[colon] == TAB):
                colon += 1
            if stop > at and colon < end and text[colon] == COLON:
                name = lower(text + at, stop - at)
                start = at
            at = colon
        while at < end and text[at] != CR and text[at] != LF:
            at += 1
        at += 1
    if name is not None:
        add_place(places, name, start, end)
    return places


cdef bytes lower(const unsigned char *text, Py_ssize_t size):
    cdef bytes made = PyBytes_FromStringAndSize(NULL, size)
    cdef char *out = PyBytes_AsString(made)
    cdef Py_ssize_t at
    for at in range(size):
        out[at] = text[at] + 32 if 65 <= text[at] <= 90 else text[at]
    return made


cdef int add_place(dict places, bytes name, Py_ssize_t start, Py_ssize_t end) except -1:
    cdef list found = <list> places.get(name)
    if found is None:
        places[name] = [(start, end)]
    else:
        found.append((start, end))
    return 0


def folded(bytes start not None, bytes text not None, Py_ssize_t first, Py_ssize_t step):
    r"""Return a field whose last line is `start` and the beginning of a long word, folded.

    `first` bytes of `text` go into that line, and `step` bytes into each further one, behind a tab.

    >>> folded(b"X: ", b"abcdefg", 3, 2)
    b'X: abc\r\n\tde\r\n\tfg\r\n'
    """
    cdef Py_ssize_t left = len(text), size = len(start), part, lines = 1
    cdef const char *place = PyBytes_AsString(text)
    cdef bytes whole
    cdef char *out
    if first < 0 or step <= 0:
        raise ValueError("a line has no room")
    if left > first:
        lines += (left - first + step - 1) // step
    whole = PyBytes_FromStringAndSize(NULL, size + left + 3 * lines - 1)
    out = PyBytes_AsString(whole)
    memcpy(out, PyBytes_AsString(start), size)
    out += size
    part = min(first, left)
    while True:
        memcpy(out, place, part)
        out += part
        place += part
        left -= part
        out[0] = CR
        out[1] = LF
        out += 2
        if not left:
            return whole
        out[0] = TAB
        out += 1
        part = min(step, left)


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
