# The types of what is in the module of this name, for the compiler.

cpdef prepare(publication, now, outbox)
cpdef checksum(number, queue, body, body_crc, properties)
cpdef proven(row)
cpdef check(row, loaded=*)
cpdef aside(row, reason)
cpdef share(inserts)
