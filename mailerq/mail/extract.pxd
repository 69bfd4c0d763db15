# Types for the compiler, of the module with this name.

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
