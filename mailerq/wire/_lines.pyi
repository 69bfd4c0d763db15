"""What the lines of a mail are like, as Python sees it."""

BARE: int
DOTTED: int

def look(mail: bytes) -> int: ...
def join(head: bytes, rest: memoryview) -> bytes: ...
