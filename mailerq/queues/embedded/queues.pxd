# The module of this name is compiled; nothing in it has need of types.
