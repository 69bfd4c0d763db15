"""Bodies of mail outside the queue: a directory, S3 or PostgreSQL keeps them under keys.

`mailerq.store` is something else: small files of the daemon itself.
"""

from mailerq.storage.interface import Backend, Body, Storage
from mailerq.storage.opening import open_storage

__all__ = ["Backend", "Body", "Storage", "open_storage"]
