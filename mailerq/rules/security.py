"""What a connection must prove before it takes a message, and whether it has proved it.

Theory of operation
-------------------
`Demands` are a set: TLS at all, a certificate that is valid for the host, hosts that match an
MTA-STS policy, TLSA records, REQUIRETLS, a login. They come from several sources: the settings and
`limits-file`, the message, the MTA-STS policy of the recipient's domain, DNSSEC. `a | b` demands
what either demands, so the order of the sources does not matter, and no source weakens another
one. Two exceptions take something away, and only what the recipient's domain has published
(`Demands.waived`): the header field ``TLS-Required: No`` (RFC 8689, section 5), unless the message
says REQUIRETLS, and a line of `limits-file` in which the operator says so.

`Level.OPPORTUNISTIC` is no demand: TLS is tried, and mail goes in clear if that fails. `plain` is
none either: the sender does not want TLS to be tried where nothing demands it.

`Proof` is what one connection has shown. `covers` says whether that is enough: a connection in a
pool serves a message only then.

For those who find policies
---------------------------
`mailerq.outbound.policies` has the interfaces. An MTA-STS lookup returns an `StsPolicy` for the
recipient's domain, or None; `DomainPolicy.demands` makes a demand of it if its mode is ``enforce``.
A DANE lookup returns a `TlsaSet` for a host, with the records that are usable; a set without
records stands for records of which none is usable: TLS is then demanded, and the certificate is not
checked (RFC 7672, section 2.2). None stands for a host that has none. A lookup that fails for now
raises `PolicyUnknown`: the host is not used, or the mail waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import Final

import msgspec

from mailerq.wire.login import Login

__all__ = [
    "LEVELS",
    "LEVEL_DEMANDS",
    "MX_MISMATCH",
    "NOTHING",
    "Demands",
    "DomainPolicy",
    "Level",
    "PolicyUnknown",
    "Proof",
    "Reason",
    "StsMode",
    "StsPolicy",
    "TlsFailure",
    "Tlsa",
    "TlsaSet",
    "covers",
    "missing",
]


class Level(IntEnum):
    """What the operator, or the message, asks of TLS. A higher level includes the lower ones."""

    NONE = 0
    """TLS is not tried."""
    OPPORTUNISTIC = 1
    """TLS is tried, with any certificate, and mail goes in clear if that fails."""
    REQUIRED = 2
    """TLS, with any certificate."""
    VERIFIED = 3
    """TLS, with a certificate that a known authority has issued for the host."""


# Each is read for every connection; the attribute of an Enum costs ten times as much.
_OPPORTUNISTIC, _REQUIRED, _VERIFIED = Level.OPPORTUNISTIC, Level.REQUIRED, Level.VERIFIED

LEVELS: Final = {
    "none": Level.NONE,
    "opportunistic": Level.OPPORTUNISTIC,
    "required": Level.REQUIRED,
    "verified": Level.VERIFIED,
}
"""The levels by their words."""


class StsMode(StrEnum):
    """The mode of an MTA-STS policy (RFC 8461, section 5)."""

    ENFORCE = "enforce"
    TESTING = "testing"
    NONE = "none"


class StsPolicy(msgspec.Struct, frozen=True, order=True):
    """The MTA-STS policy of a recipient's domain (RFC 8461, section 3.2).

    `mx_patterns` are in lower case and A-labels, without a final dot; ``*.`` stands for one label.
    """

    domain: str
    id: str
    mode: StsMode
    mx_patterns: tuple[str, ...]

    def allows(self, host: str) -> bool:
        """Whether a host of an MX record matches a pattern (section 4.1).

        >>> policy = StsPolicy("d.test", "1", StsMode.ENFORCE, ("mx.d.test", "*.m.test"))
        >>> [policy.allows(name) for name in ("MX.d.test.", "a.m.test", "a.b.m.test", "m.test")]
        [True, True, False, False]
        """
        name = host.lower().rstrip(".")
        above = name.partition(".")[2]
        return name in self.mx_patterns or (bool(above) and f"*.{above}" in self.mx_patterns)

    def __str__(self) -> str:
        return f"the MTA-STS policy of {self.domain} (id {self.id})"


class Tlsa(msgspec.Struct, frozen=True, order=True):
    """A TLSA record (RFC 6698, section 2.1): usage, selector, matching type, association data."""

    usage: int
    selector: int
    matching: int
    data: bytes


class TlsaSet(msgspec.Struct, frozen=True, order=True):
    """The usable TLSA records of a host.

    `base_domain` is the name at which they are, and the name to ask for by SNI. `names` are those
    that a certificate may have if an authority of the records has issued it (usage 2). Without
    `records` none is usable.
    """

    base_domain: str
    records: frozenset[Tlsa]
    names: tuple[str, ...] = ()

    @property
    def demands(self) -> Demands:
        """What a connection to the host must prove."""
        return Demands(tlsa=frozenset((self,))) if self.records else Demands(Level.REQUIRED)

    def __str__(self) -> str:
        return f"the TLSA records of {self.base_domain}"


class PolicyUnknown(Exception):
    """A policy cannot be found out now, for the reason in the text; the mail waits."""


class Demands(msgspec.Struct, frozen=True, cache_hash=True):
    """What a connection must prove before it takes a message; hashable, part of a flow's key.

    Each field adds demands of its own, see the module. All records sets in `tlsa` must be met, each
    by one of its records. More than one login cannot be met by one connection.

    >>> Demands(Level.OPPORTUNISTIC) | Demands(Level.VERIFIED)
    Demands(verified)
    >>> Demands(Level.OPPORTUNISTIC, plain=True).tries, Demands(Level.REQUIRED, plain=True).tries
    (False, True)
    """

    level: Level = Level.NONE
    sts: frozenset[StsPolicy] = frozenset()
    tlsa: frozenset[TlsaSet] = frozenset()
    requiretls: bool = False
    logins: frozenset[Login] = frozenset()
    plain: bool = False

    def __or__(self, other: Demands) -> Demands:
        if other is NOTHING or self is other:
            return self
        if self is NOTHING:
            return other
        return Demands(
            max(self.level, other.level),
            self.sts | other.sts,
            self.tlsa | other.tlsa,
            self.requiretls or other.requiretls,
            self.logins | other.logins,
            self.plain or other.plain,
        )

    @property
    def encrypts(self) -> bool:
        """Whether mail must not go in clear."""
        return self.level >= _REQUIRED or self.requiretls or bool(self.sts or self.tlsa)

    @property
    def tries(self) -> bool:
        """Whether to use TLS if the peer offers it."""
        return self.encrypts or (self.level is _OPPORTUNISTIC and not self.plain)

    @property
    def webpki(self) -> bool:
        """Whether a known authority must have issued the certificate, for the name of the host.

        For REQUIRETLS the TLSA records of the host will do as well (RFC 8689, section 4.2.1).
        """
        known = self.level is _VERIFIED or bool(self.sts)
        return known or (self.requiretls and not self.tlsa)

    @property
    def login(self) -> Login | None:
        """The login to prove; None if there is none."""
        return next(iter(self.logins), None)

    def waived(self) -> Demands:
        """The demands without what the recipient's domain has published.

        The two exceptions of the module ask for this. What the operator and the message demand
        stays. A message with REQUIRETLS keeps everything (RFC 8689, section 5): ask `may_waive`.
        """
        if not (self.sts or self.tlsa):
            return self
        return msgspec.structs.replace(self, sts=frozenset(), tlsa=frozenset())

    @property
    def may_waive(self) -> bool:
        """Whether ``TLS-Required: No`` has an effect."""
        return not self.requiretls

    def words(self) -> Iterator[str]:
        """Yield the demands for people."""
        if self.level >= Level.REQUIRED:
            yield self.level.name.lower()
        yield from sorted(map(str, self.sts))
        yield from sorted(map(str, self.tlsa))
        if self.requiretls:
            yield "REQUIRETLS"

    def __str__(self) -> str:
        """The demands in a sentence about TLS, without the login.

        >>> str(Demands(Level.REQUIRED, requiretls=True)), str(Demands())
        ('required, REQUIRETLS', 'none')
        """
        return ", ".join(self.words()) or ("opportunistic" if self.tries else "none")

    def __repr__(self) -> str:
        return f"Demands({self})"


NOTHING: Final = Demands()
"""No demands, and TLS is not tried."""

LEVEL_DEMANDS: Final = tuple(Demands(level) for level in Level)
"""The demands of each level alone."""


class DomainPolicy(msgspec.Struct, frozen=True):
    """What a recipient's domain has published about TLS.

    `secure`: DNSSEC has proved the MX records, so the TLSA records of the hosts count. `sts` is the
    policy in force, of any mode but ``none``. `names` are those that the certificate of a host may
    have besides its own, if a TLSA record of a host trusts an authority; otherwise there are none,
    so that domains with the same hosts have the same policy.
    """

    sts: StsPolicy | None = None
    secure: bool = False
    names: tuple[str, ...] = ()

    @property
    def enforced(self) -> StsPolicy | None:
        """The MTA-STS policy, if the domain wants it enforced."""
        return self.sts if self.sts is not None and self.sts.mode is StsMode.ENFORCE else None

    @property
    def demands(self) -> Demands:
        """What all hosts of the domain must prove."""
        policy = self.enforced
        return NOTHING if policy is None else Demands(sts=frozenset((policy,)))

    @property
    def proves_hosts(self) -> bool:
        """Whether the hosts are those of the domain beyond doubt (RFC 8689, section 4.2.1)."""
        return self.secure or self.enforced is not None


class Proof(msgspec.Struct, frozen=True):
    """What a connection to `host` has proved.

    `webpki`: a known authority has issued the certificate, for this host. `tlsa` are the sets of
    records that the certificate has matched. `requiretls`: the peer offers REQUIRETLS inside TLS.
    `logins` has the login that the peer took.
    """

    host: str
    encrypted: bool = False
    webpki: bool = False
    tlsa: frozenset[TlsaSet] = frozenset()
    requiretls: bool = False
    logins: frozenset[Login] = frozenset()


def covers(proof: Proof, demands: Demands) -> bool:
    """Whether a connection has proved all that is demanded.

    >>> covers(Proof("mx.d.test", encrypted=True), Demands(Level.REQUIRED))
    True
    >>> covers(Proof("mx.d.test", encrypted=True), Demands(Level.VERIFIED))
    False
    """
    return next(missing(proof, demands), None) is None


def missing(proof: Proof, demands: Demands) -> Iterator[str]:
    """Yield what a connection has not proved, for people."""
    if demands.encrypts and not proof.encrypted:
        yield "TLS"
    for policy in demands.sts:
        if not policy.allows(proof.host):
            yield f"a host that matches {policy}"
    if demands.level is Level.VERIFIED or demands.sts:
        if not proof.webpki:
            yield "a valid certificate"
    elif demands.requiretls and not (proof.webpki or proof.tlsa):
        yield "a valid certificate"
    for records in demands.tlsa - proof.tlsa:
        yield f"a certificate that matches {records}"
    if demands.requiretls and not proof.requiretls:
        yield "REQUIRETLS"
    if not demands.logins <= proof.logins:
        yield "the login"


class Reason(StrEnum):
    """Why TLS failed, in the words of TLS-RPT where it has one (RFC 8460, section 4.3)."""

    NO_STARTTLS = "starttls-not-supported"
    HOST_MISMATCH = "certificate-host-mismatch"
    EXPIRED = "certificate-expired"
    NOT_TRUSTED = "certificate-not-trusted"
    FAILURE = "validation-failure"
    TLSA_INVALID = "tlsa-invalid"
    DNSSEC_INVALID = "dnssec-invalid"
    DANE_REQUIRED = "dane-required"
    STS_FETCH = "sts-policy-fetch-error"
    STS_INVALID = "sts-policy-invalid"
    STS_WEBPKI = "sts-webpki-invalid"


MX_MISMATCH: Final = "mtasts-policy-mx-mismatch"
"""The ``failure-reason-code`` of a host that a policy does not name; `Reason` has no word."""


class TlsFailure(msgspec.Struct, frozen=True):
    """Why a connection does not prove what is demanded; never final, and never a reason for clear.

    `text` names the peer and the demand. `code` is a ``failure-reason-code`` of TLS-RPT.
    `requiretls`: the promise of RFC 8689 cannot be kept here; if that is so at the end of the
    message's time, its status is 5.7.30. `timed_out`: the peer did not answer.
    """

    reason: Reason
    text: str
    code: str = ""
    requiretls: bool = False
    timed_out: bool = False
