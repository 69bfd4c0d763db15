"""Types of `_lines`, for type checkers."""

BARE: int
DOTTED: int

def look(mail: bytes) -> int: ...
def join(head: bytes, rest: memoryview) -> bytes: ...
