# The types of what is in the module of this name, for the compiler.

cpdef place_of(properties)
cpdef _lane(properties)
