# The types of what is in the module of this name, for the compiler.

cpdef route_of(properties, domain, config)
cpdef _smarthost(smarthost)
