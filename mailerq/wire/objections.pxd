# The types of what is in the module of this name, for the compiler.

cpdef _is_safe(address)
