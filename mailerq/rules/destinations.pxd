# The types of what is in the module of this name, for the compiler.

cpdef place_of(properties)
cpdef _demanded(properties, smarthost)
cpdef _secure(smarthost)
cpdef _lane(properties)
