# Marks the module of this name for compilation; it needs no types.
