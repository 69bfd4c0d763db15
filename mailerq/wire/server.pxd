# Types for the compiler, of the module with this name.

cimport cython

from mailerq.wire.framing cimport Body as _Body


@cython.final
cdef class ServerProtocol:
    cdef public Py_ssize_t errors, failures, steps, _idle_commands, _refused_recipients
    cdef public Py_ssize_t _position, _discarding
    cdef public _Body _body
    cdef public bint secure, auth_in_clear, xclient, authenticated, _eof, _chunking
    cdef public bint _chunk_is_last
    cdef public bytes _line, _buffer
    cdef public list rcpts, _out
    cdef public object settings, hello, mail, state, refusals, _event, _chunk_left
    cdef public object _chunk_refusal, _exchange, _mechanism, _closing

    cpdef receive_data(self, data)
    cpdef data_to_send(self)
    cpdef write(self, data)
    cpdef send(self, reply)
    cpdef greet(self, reply=*)
    cpdef close(self, reply, reason)
    cpdef tls_started(self)
    cpdef next_event(self)
    cpdef _begin_content(self, reply, sink)
    cpdef reject(self, reply)
    cpdef _next_command(self)
    cpdef _incomplete(self, limit)
    cpdef _auth_response(self, line)
    cpdef _challenge(self, challenge)
    cpdef _auth_failed(self, reply)
    cpdef _recipient_failed(self, reply)
    cpdef _why_not_data(self)
    cpdef _refuse_chunk(self, reply)
    cpdef _unknown_command(self, verb)
    cpdef _next_content(self)
    cpdef _next_chunk(self)
    cpdef _finish_content(self)
    cpdef _take_buffer(self)
    cpdef _need_data(self)
    cpdef _content_failed(self, reply)
    cpdef _repeat(self, reply)
    cpdef _may_authenticate(self)
    cpdef _idled_out(self)
    cpdef _reset(self)
    cpdef _fail(self, reply)
    cpdef _close(self, reply, reason)
