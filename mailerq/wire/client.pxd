# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class ClientProtocol:
    cdef public Py_ssize_t replies, _at
    cdef public bint _eof, _recipient_stands, _transaction_open, _body_due
    cdef public bytes _hostname, _input, _code
    cdef public dict extensions
    cdef public list _output, _lines
    cdef public object mta, _due, _later, _refusal, _over, _blocks

    cpdef send_body(self, body)
    cpdef quit(self)
    cpdef data_to_send(self)
    cpdef _send_commands(self)
    cpdef receive_data(self, data)
    cpdef next_event(self)
    cpdef abort(self, problem, description)
    cpdef _finish(self, event)
    cpdef _next_reply(self)
    cpdef _take(self, reply)
    cpdef _take_hello(self, step, reply, kind)
    cpdef _begin_body(self)
    cpdef _take_unasked(self, reply)
    cpdef _report_refusal(self)
    cpdef _invalid(self, step, reply)


cpdef _is_safe(address)
