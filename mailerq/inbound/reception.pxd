# The types of what is in the module of this name, for the compiler.

cpdef _all(reply, machine)
cpdef _envelope(terms, client, plugin, machine)
cpdef _dsn(mail, rcpt)
cpdef _received_line(message)
