# The types of what is in the module of this name, for the compiler.

cpdef _parse_unusual(text, utf8)
cpdef _drop_route(path, allowed)
cpdef parse_domain(text)
cpdef parse_literal(text)
cpdef parse_ip(text)
cpdef parse_host(text)
cpdef _shown(text)
cpdef bint queue_leads_to(name, queue)
cpdef queue_problem(name)
