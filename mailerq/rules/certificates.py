"""What is said about a peer's certificate, and what was wrong with it.

Results name the certificate of a connection (`Facts`). OpenSSL's verdicts become words of TLS-RPT
(`reason_of`). `webpki_failure` judges a chain after a handshake in which nobody did: an MTA-STS
policy in mode ``testing`` must not end the handshake, and wants to know.

Certificates come from strangers. OpenSSL bounds a chain to 100 kB; the constants here bound what is
kept of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from mailerq.message import format_time
from mailerq.rules.security import Reason

__all__ = ["Facts", "authorities", "facts_of", "reason_of", "webpki_failure"]

MAX_NAMES: Final = 20
"""Alternative names that a result has."""

MAX_CHARS: Final = 255
"""Characters of each text from a certificate."""

MAX_CHAIN: Final = 10
"""Certificates of a chain that are looked at."""

PARTS: Final = {
    "common": NameOID.COMMON_NAME,
    "organization": NameOID.ORGANIZATION_NAME,
    "locality": NameOID.LOCALITY_NAME,
    "state": NameOID.STATE_OR_PROVINCE_NAME,
    "country": NameOID.COUNTRY_NAME,
}
"""The parts of a name in results."""

_REASONS: Final = {
    10: Reason.EXPIRED,
    62: Reason.HOST_MISMATCH,
    64: Reason.HOST_MISMATCH,  # of an IP address
    **dict.fromkeys((18, 19, 20, 21), Reason.NOT_TRUSTED),
}


def reason_of(verify_code: int) -> Reason:
    """OpenSSL's X509_V_ERR code as a word of TLS-RPT.

    >>> reason_of(10), reason_of(18), reason_of(0)
    (<Reason.EXPIRED: 'certificate-expired'>, <Reason.NOT_TRUSTED: 'certificate-not-trusted'>, \
<Reason.FAILURE: 'validation-failure'>)
    """
    return _REASONS.get(verify_code, Reason.FAILURE)


class Facts(msgspec.Struct, frozen=True):
    """A certificate as results show it; times in UTC."""

    subject: dict[str, str]
    issuer: dict[str, str]
    not_before: str
    not_after: str
    altnames: tuple[str, ...]
    self_signed: bool

    def to_dict(self, *, verified: bool) -> dict[str, Any]:
        """The object ``certificate`` of a result."""
        return {
            "verified": verified,
            "subject": self.subject,
            "issuer": self.issuer,
            "notbefore": self.not_before,
            "notafter": self.not_after,
            "altnames": list(self.altnames),
            "self-signed": self.self_signed,
        }


def facts_of(der: bytes) -> Facts | None:
    """What a certificate in DER says; None if it says nothing that can be read."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        subject, issuer = certificate.subject, certificate.issuer
        return Facts(
            _name(subject),
            _name(issuer),
            _time(certificate.not_valid_before_utc),
            _time(certificate.not_valid_after_utc),
            tuple(_names(certificate)[:MAX_NAMES]),
            subject == issuer,
        )
    except Exception:
        # The library has many errors for what strangers write, and none is about this host.
        return None


def _time(moment: datetime) -> str:
    return format_time(moment.timestamp())


def _name(name: x509.Name) -> dict[str, str]:
    found = {}
    for key, oid in PARTS.items():
        if values := name.get_attributes_for_oid(oid):
            value = values[0].value
            text = value if isinstance(value, str) else value.hex()
            found[key] = text[:MAX_CHARS]
    return found


def _names(certificate: x509.Certificate) -> list[str]:
    """The DNS names and addresses that a certificate is for."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    names = [
        str(each.value)[:MAX_CHARS]
        for each in extension.value
        if isinstance(each, x509.DNSName | x509.IPAddress)
    ]
    return names


def authorities(ders: Sequence[bytes]) -> Store | None:
    """The store of `webpki_failure`, None if empty; what cannot be read is left out."""
    found = []
    for der in ders:
        try:
            found.append(x509.load_der_x509_certificate(der))
        except ValueError:
            continue
    return Store(found) if found else None


def _is_authority(
    policy: Policy, certificate: x509.Certificate, constraints: x509.BasicConstraints
) -> None:
    if not constraints.ca:
        raise ValueError("it is not the certificate of an authority")


# As OpenSSL, which judges where a policy is enforced: the rules of browsers are stricter.
_OF_AUTHORITIES: Final = ExtensionPolicy.permit_all().require_present(
    x509.BasicConstraints, Criticality.AGNOSTIC, _is_authority
)
_OF_HOSTS: Final = ExtensionPolicy.permit_all().require_present(
    x509.SubjectAlternativeName, Criticality.AGNOSTIC, None
)


def webpki_failure(
    chain: Sequence[bytes], host: str, trusted: Store | None, *, now: float
) -> tuple[Reason, str] | None:
    """Why no authority vouches for the certificate of a host, or None if one does.

    `chain` is in DER, the peer's own certificate first. `now` is in seconds since 1970.
    """
    if not chain:
        return Reason.FAILURE, "there is no certificate"
    moment = datetime.fromtimestamp(now, UTC)
    try:
        leaf, *others = (x509.load_der_x509_certificate(der) for der in chain[:MAX_CHAIN])
        if leaf.not_valid_after_utc < moment:
            return Reason.EXPIRED, f"it has expired on {_time(leaf.not_valid_after_utc)}"
        subject: x509.DNSName | x509.IPAddress
        try:
            subject = x509.IPAddress(ip_address(host))
        except ValueError:
            subject = x509.DNSName(host)
        if trusted is None:
            return Reason.NOT_TRUSTED, "no authority is known here"
        builder = PolicyBuilder().store(trusted).time(moment)
        builder = builder.extension_policies(ca_policy=_OF_AUTHORITIES, ee_policy=_OF_HOSTS)
        builder.build_server_verifier(subject).verify(leaf, others)
    except VerificationError as error:
        if not _is_for(leaf, host):
            return Reason.HOST_MISMATCH, "it is for other names"
        return Reason.NOT_TRUSTED, str(error)[:MAX_CHARS]
    except Exception as error:
        return Reason.FAILURE, str(error)[:MAX_CHARS]
    return None


def _is_for(certificate: x509.Certificate, host: str) -> bool:
    """Whether a name of a certificate is that of a host."""
    name = host.lower().rstrip(".")
    above = "*." + name.partition(".")[2]
    return any(each.lower() in (name, above) for each in _names(certificate))
