"""Imports of the engine that would otherwise happen when first needed.

The command line imports little, and some libraries import their own parts late. But a late import
reads files: it fails while no descriptor is left, and takes another version of a package that was
replaced while the process runs.
"""

from __future__ import annotations

from typing import Any, Final

from mailerq.message import format_time, parse_time

__all__ = ["import_all"]

RECORDS: Final = ("A", "AAAA", "CNAME", "DNAME", "MX", "NS", "RRSIG", "SOA", "TLSA", "TXT")
"""Kinds of DNS records in usual answers; dnspython has a module for each."""


def import_all() -> None:
    """Import what sessions and deliveries use."""
    import argon2  # noqa: F401
    import cryptography.hazmat.primitives.asymmetric.ed25519
    import cryptography.hazmat.primitives.asymmetric.padding
    import cryptography.hazmat.primitives.serialization  # noqa: F401
    import dns.asyncbackend
    import dns.asyncresolver
    import dns.nameserver
    import dns.rdata
    import idna

    import mailerq.rules.dane  # noqa: F401

    dns.asyncbackend.get_backend("trio")
    class_of: Any = dns.rdata.get_rdata_class
    for kind in RECORDS:
        class_of(dns.rdataclass.IN, dns.rdatatype.from_text(kind))
    idna.encode("ü.test", uts46=True)
    "ü.test".encode("idna")  # as getaddrinfo does
    parse_time(format_time(0))
