# The types of what is in the module of this name, for the compiler.

cpdef _is_str(value)
cpdef _is_bool(value)
cpdef _is_security(value)
cpdef _is_int(value)
cpdef _is_dict(value)
cpdef _is_flag(value)
