# The types of what is in the module of this name, for the compiler.

cpdef format_time(now)
cpdef parse_time(text)
cpdef decode_properties(data)
cpdef _kind(value)
cpdef _is_str(value)
cpdef _is_int(value)
cpdef _is_dict(value)
cpdef _is_flag(value)
