# The types of what is in the module of this name, for the compiler.

cpdef _no_port(config, option, ip, port, error)
cpdef _load(worker)
cpdef _all_addresses()
cpdef _any_port(config, option, stack)
