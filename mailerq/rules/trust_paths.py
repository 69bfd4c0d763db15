"""Read the certificates of a peer, and check a path of them up to a trust anchor (RFC 5280).

Strangers make them, so everything is bounded: the size of a key, the work for their names. What the
library cannot read or check is a problem of the certificate, and never an exception.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from mailerq.escaping import escape
from mailerq.rules.security import Reason, TlsFailure

__all__ = [
    "Presented",
    "Step",
    "accepted_names",
    "element",
    "key_part",
    "problems",
    "shown",
    "signed",
]

ExtensionType = TypeVar("ExtensionType", bound=x509.ExtensionType)

MAX_KEY_BITS: Final = 8192
MAX_EXPONENT_BITS: Final = 64
"""Bounds of an RSA key: the time of a check grows with both."""

NAMES_SHOWN: Final = 3
TEXT_SHOWN: Final = 100
"""Names of a certificate in a reason, and characters of each."""

HASHES: Final = (hashes.SHA224, hashes.SHA256, hashes.SHA384, hashes.SHA512)
"""Digests in signatures of certificates; MD5 and SHA-1 can be forged."""

UNDERSTOOD: Final = frozenset({
    ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ExtensionOID.NAME_CONSTRAINTS,
    # Nobody asks for a policy here, so these forbid nothing.
    ExtensionOID.CERTIFICATE_POLICIES, ExtensionOID.POLICY_MAPPINGS,
    ExtensionOID.POLICY_CONSTRAINTS, ExtensionOID.INHIBIT_ANY_POLICY,
})  # fmt: skip
"""Extensions that may be critical."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A certificate whose parts have been read: the library reads each when asked for."""

    certificate: x509.Certificate
    extensions: x509.Extensions
    subject: x509.Name
    issuer: x509.Name
    begin: datetime
    end: datetime

    @classmethod
    def of(cls, der: bytes) -> Self:
        """Raises what the library raises for what it cannot read."""
        certificate = x509.load_der_x509_certificate(der)
        if not _algorithms_agree(der):
            raise ValueError("the algorithm of its signature is not the one that was signed")
        return cls(
            certificate,
            certificate.extensions,
            certificate.subject,
            certificate.issuer,
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
        )


class Presented:
    """A certificate of the peer; read as far as needed."""

    def __init__(self, der: bytes) -> None:
        self.der = bytes(der)
        self._key: bytes | None = None
        self._read: Parsed | str | None = None

    @property
    def key(self) -> bytes:
        """The key as DER, byte by byte as in the certificate; empty if there is none."""
        if self._key is None:
            try:
                self._key = key_part(self.der)
            except ValueError:
                self._key = b""
        return self._key

    @property
    def read(self) -> Parsed | str:
        """The certificate, or why it cannot be read."""
        if self._read is None:
            try:
                self._read = Parsed.of(self.der)
            except Exception as error:  # the parser's own errors and its warnings as errors
                self._read = f"a certificate cannot be read: {shown(str(error))}"
        return self._read


def shown(text: str) -> str:
    """Text from outside, cut and escaped for a reason."""
    return escape(" ".join(text.split())[:TEXT_SHOWN])


def element(der: bytes, at: int, tag: int | None = None) -> tuple[int, int]:
    """Where the content of a DER element begins and ends. Raises ValueError."""
    if len(der) < at + 2 or (tag is not None and der[at] != tag):
        raise ValueError("not the expected element")
    size, begin = der[at + 1], at + 2
    if size >= 0x80:
        count = size & 0x7F
        if not 1 <= count <= 4 or len(der) < begin + count:
            raise ValueError("no length in DER")
        size = int.from_bytes(der[begin : begin + count], "big")
        begin += count
    if begin + size > len(der):
        raise ValueError("cut short")
    return begin, begin + size


SEQUENCE: Final = 0x30
VERSION: Final = 0xA0
BEFORE_KEY: Final = 5
"""Serial number, signature algorithm, issuer, validity, subject (RFC 5280, section 4.1)."""


def key_part(der: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a certificate, as it stands there. Raises ValueError.

    An encoder of a library could write the same key in other bytes, and would not know all keys.
    """
    begin, end = element(der, 0, SEQUENCE)
    if end != len(der):
        raise ValueError("bytes after the certificate")
    at, end = element(der, begin, SEQUENCE)
    if der[at : at + 1] == bytes([VERSION]):
        at = element(der, at)[1]
    for _ in range(BEFORE_KEY):
        at = element(der, at)[1]
    after = element(der, at, SEQUENCE)[1]
    if after > end:
        raise ValueError("cut short")
    return der[at:after]


def _algorithms_agree(der: bytes) -> bool:
    """Whether the algorithm beside the signature is that of the signed part (RFC 5280, 4.1.1.2)."""
    begin, _ = element(der, 0, SEQUENCE)
    at, after = element(der, begin, SEQUENCE)
    if der[at : at + 1] == bytes([VERSION]):
        at = element(der, at)[1]
    at = element(der, at)[1]  # the serial number
    return der[at : element(der, at)[1]] == der[after : element(der, after)[1]]


def signed(certificate: x509.Certificate, key: object) -> bool:
    """Whether `key` made the signature. Raises what the library raises for what it cannot do."""
    signature, signed = certificate.signature, certificate.tbs_certificate_bytes
    try:
        if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
            key.verify(signature, signed)
            return True
        digest = certificate.signature_hash_algorithm
        if not isinstance(digest, HASHES):
            raise ValueError("no digest of the SHA-2 family")
        how = certificate.signature_algorithm_parameters
        if isinstance(key, rsa.RSAPublicKey):
            numbers = key.public_numbers()
            if numbers.n.bit_length() > MAX_KEY_BITS or numbers.e.bit_length() > MAX_EXPONENT_BITS:
                raise ValueError(f"the RSA key is above {MAX_KEY_BITS} bits")
            if not isinstance(how, padding.PKCS1v15 | padding.PSS):
                return False
            key.verify(signature, signed, how, digest)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            if not isinstance(how, ec.ECDSA):
                return False
            key.verify(signature, signed, how)
        else:
            raise ValueError(f"{type(key).__name__} is not supported")
    except InvalidSignature:
        return False
    return True


@dataclass(slots=True)
class Step:
    """A certificate that signatures lead to from the leaf, and the step below it."""

    parsed: Parsed
    below: Step | None
    presented: Presented

    def path(self) -> list[Step]:
        """From this step down to the leaf."""
        steps, step = [self], self.below
        while step is not None:
            steps.append(step)
            step = step.below
        return steps


def problems(
    path: Sequence[Step], names: Collection[str], now: datetime, *, bare: bool
) -> Iterator[TlsFailure]:
    """What is wrong with a path, from the anchor down to the leaf (RFC 5280, section 6.1)."""
    for step in path:
        what = "the certificate" if step.below is None else "the certificate of an issuer"
        begin, end = step.parsed.begin, step.parsed.end
        if now > end:
            yield TlsFailure(Reason.EXPIRED, f"{what} expired on {end:%Y-%m-%d}")
        if now < begin:
            yield TlsFailure(Reason.FAILURE, f"{what} is not valid before {begin:%Y-%m-%d}")
        for extension in step.parsed.extensions:
            if extension.critical and extension.oid not in UNDERSTOOD:
                text = f"{what} has an unknown critical extension {extension.oid.dotted_string}"
                yield TlsFailure(Reason.FAILURE, text)
    issuers = path[:-1]
    for place, step in enumerate(issuers):
        anchor = place == 0 and not bare
        if problem := _issuer_problem(step, len(issuers) - 1 - place, anchor=anchor):
            yield problem
    leaf = path[-1]
    usages = _extension(leaf, x509.ExtendedKeyUsage)
    if usages is not None and not (
        {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & {*usages}
    ):
        yield TlsFailure(Reason.FAILURE, "the certificate is not for servers")
    presented = _names(leaf)
    good = accepted_names(names).intersection(map(_canonical, presented))
    if not good:
        some = ", ".join(map(shown, presented[:NAMES_SHOWN])) or "nothing"
        more = ", …" if len(presented) > NAMES_SHOWN else ""
        text = f"the certificate names {some}{more}, not {' or '.join(sorted(names))}"
        yield TlsFailure(Reason.HOST_MISMATCH, text)
    elif not any(_may_name(issuers, name) for name in good):
        text = f"an issuer may not issue certificates for {min(good)}"
        yield TlsFailure(Reason.FAILURE, text)


def _issuer_problem(step: Step, below: int, *, anchor: bool) -> TlsFailure | None:
    """Why a certificate may not sign others; `below` is the number of issuers under it."""
    basic = _extension(step, x509.BasicConstraints)
    if basic is None:
        # The record says that this one is an authority; certificates of version 1 cannot.
        if not anchor:
            return TlsFailure(
                Reason.NOT_TRUSTED, "a certificate that signs another is no authority"
            )
    elif not basic.ca:
        return TlsFailure(Reason.NOT_TRUSTED, "a certificate that signs another is no authority")
    elif basic.path_length is not None and below > basic.path_length:
        return TlsFailure(Reason.NOT_TRUSTED, "the chain is longer than an issuer allows")
    usage = _extension(step, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return TlsFailure(Reason.NOT_TRUSTED, "the key of an issuer is not for certificates")
    return None


def _extension(step: Step, kind: type[ExtensionType]) -> ExtensionType | None:
    try:
        return step.parsed.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _names(leaf: Step) -> list[str]:
    """The DNS names. A common name is none: no constraint of an issuer bounds it.

    RFC 7672, section 3.2.3, allows a client to take it where there are no DNS names.
    """
    alternative = _extension(leaf, x509.SubjectAlternativeName)
    return [] if alternative is None else alternative.get_values_for_type(x509.DNSName)


def _may_name(issuers: Iterable[Step], name: str) -> bool:
    """Whether the name constraints of all issuers allow a DNS name (RFC 5280, section 4.2.1.10).

    Only DNS names of the leaf count here, so constraints on other names forbid nothing.
    """
    for step in issuers:
        limits = _extension(step, x509.NameConstraints)
        if limits is None:
            continue
        permitted, excluded = (
            [tree.value for tree in (trees or ()) if isinstance(tree, x509.DNSName)]
            for trees in (limits.permitted_subtrees, limits.excluded_subtrees)
        )
        if any(_is_under(name, tree) for tree in excluded):
            return False
        if permitted and not any(_is_under(name, tree) for tree in permitted):
            return False
    return True


def _is_under(name: str, tree: str) -> bool:
    name, tree = _canonical(name), _canonical(tree)
    if tree.startswith("."):
        return name.endswith(tree)
    return not tree or name == tree or name.endswith("." + tree)


def accepted_names(references: Collection[str]) -> set[str]:
    """The names in a certificate that stand for one of the references (RFC 7672, section 3.2.3).

    A star stands for the whole first label, and never for one below a top-level domain.

    >>> sorted(accepted_names(["MX.example.com.", "example.com"]))
    ['*.example.com', 'example.com', 'mx.example.com']
    """
    names = {_canonical(name) for name in references} - {""}
    parents = {name.partition(".")[2] for name in names}
    return names | {f"*.{parent}" for parent in parents if "." in parent}


def _canonical(name: str) -> str:
    return name.removesuffix(".").lower()
