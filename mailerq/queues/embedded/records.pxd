# The types of what is in the module of this name, for the compiler.

cpdef prepare(publication, now)
cpdef checksum(number, queue, body, body_crc, properties)
cpdef proven(row)
cpdef check(row)
cpdef aside(row, reason)
cpdef share(inserts)
