# The types of what is in the module of this name, for the compiler.

cpdef _printable(name)
cpdef _flag(text)
cpdef _number(text)
cpdef _port(text)
cpdef _numbers(text)
cpdef _time(text)
cpdef _ip(text)
cpdef _word(text)
cpdef _tag(text)
cpdef _queue(text)
cpdef _envelope(text)
