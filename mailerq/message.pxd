# The types of what is in the module of this name, for the compiler.

cpdef format_time(now)
cpdef parse_time(text)
cpdef decode_properties(data)
cpdef _kind(value)
