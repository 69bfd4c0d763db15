# The types of what is in the module of this name, for the compiler.

cimport cython


@cython.final
cdef class ClientProtocol:
    cdef public Py_ssize_t replies, max_mails, max_domains, _at
    cdef public bint careful, secure, may_go_ahead, _lmtp, _tls, _must_tls
    cdef public bint out_of_step, _eof, _ahead, _proved, _doubted, _fresh, _transaction_open
    cdef public bint _body_due, _asked, _binary, _last, _farewell
    cdef public bytes _hostname, _input, _code
    cdef public dict extensions
    cdef public list _output, _lines
    cdef public object mta, mechanism, _login, _exchange
    cdef public object _due, _later, _held, _refusal, _over, _blocks
    cdef public object _sender, _known_sender

    cpdef secured(self)
    cpdef quit(self)
    cpdef data_to_send(self)
    cpdef _send_commands(self)
    cpdef receive_data(self, data)
    cpdef next_event(self)
    cpdef abort(self, problem, description)
    cpdef _finish(self, event)
    cpdef _next_reply(self)
    cpdef _take(self, reply)
    cpdef _take_refusal(self, step, reply)
    cpdef _take_verdict(self, reply)
    cpdef _take_go(self, reply)
    cpdef _take_goodbye(self, reply)
    cpdef _take_farewell(self, step, reply)
    cpdef _take_hello(self, step, reply, kind)
    cpdef _say_hello(self, step)
    cpdef _put(self, step, line)
    cpdef _take_auth(self, step, reply)
    cpdef _take_unasked(self, reply)
    cpdef _take_early(self, reply)
    cpdef _report(self)
    cpdef _say(self, step)
    cpdef _unproved(self)
    cpdef _stands(self, ending, problem)
    cpdef _more_came(self)
    cpdef _is_no_answer_to_mail(self, reply)
    cpdef _invalid(self, step, reply)
    cpdef _too_early(self)


cpdef _verdict(reply)
cpdef _is_out_of_sequence(reply)
cpdef _ends_body(ending)
