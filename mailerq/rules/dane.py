"""DANE for SMTP: judge a certificate chain by the TLSA records of a host (RFC 7672, RFC 7671).

Theory of operation
-------------------
`tlsa_set` reads the TLSA records of a host, which DNSSEC has proved. They demand encryption; they
demand a match as well unless none of them is usable. `verify` judges the chain that a peer has
presented. One match is enough:

- DANE-EE(3): the leaf is the certificate or has the key of the record. Names, dates and issuers do
  not count (RFC 7672, section 3.1.1).
- DANE-TA(2): a presented certificate, or the certificate or key in the record itself, is the trust
  anchor. Signatures, dates and constraints lead from the leaf to the anchor, and the leaf has one
  of the reference names (sections 3.1.2 and 3.2.2).

PKIX-TA(0) and PKIX-EE(1) are unusable (section 3.1.3). Of the digests for one usage and selector
only the strongest counts (RFC 7671, section 8).

Strangers make the records and the chain, so the work for both has limits: the certificates that are
read, the signatures that are checked, the size of a key, the records that hold a whole certificate
or key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mailerq.rules.security import Reason, Tlsa, TlsaSet, TlsFailure
from mailerq.rules.trust_paths import (
    SEQUENCE,
    Presented,
    Step,
    element,
    key_part,
    problems,
    shown,
    signed,
)

__all__ = ["is_usable", "tlsa_set", "verify"]

PKIX_TA, PKIX_EE, DANE_TA, DANE_EE = range(4)
CERTIFICATE, KEY = range(2)
FULL, SHA256, SHA512 = range(3)

DIGEST_BYTES: Final = {SHA256: 32, SHA512: 64}

MAX_CERTIFICATES: Final = 32
"""Presented certificates considered; chains of four are long."""

MAX_SIGNATURES: Final = 16
"""Signatures checked for one chain, each up to a millisecond."""

MAX_FULL: Final = 16
"""Records with a whole certificate or key that are read."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def tlsa_set(base: str, records: Iterable[Tlsa], names: Iterable[str] = ()) -> TlsaSet | None:
    """The usable records of a host; None if there is no record, so DANE demands nothing.

    `base` is the name that has the records below it, without ``_25._tcp``. `names` are the
    reference names besides `base`: the next-hop domain, and what its CNAME leads to, if the MX
    answer was secure (RFC 7672, section 3.2.2). They are left out unless a record needs them, so
    that domains with the same hosts share connections.

    >>> tlsa_set("mx.example", [Tlsa(1, 1, 1, bytes(32))]).records
    frozenset()
    """
    records = dict.fromkeys(records)
    if not records:
        return None
    usable, full = [], 0
    for record in records:
        full += record.matching == FULL
        # Beyond the limit nobody reads the data, and the record counts: that is never weaker.
        if is_usable(record, read=full <= MAX_FULL):
            usable.append(record)
    best: dict[tuple[int, int], int] = {}
    for record in usable:
        kind = record.usage, record.selector
        best[kind] = max(best.get(kind, FULL), record.matching)
    strongest = frozenset(r for r in usable if r.matching in (FULL, best[r.usage, r.selector]))
    if not any(record.usage == DANE_TA for record in strongest):
        names = ()
    return TlsaSet(base, strongest, tuple(sorted({*names} - {base})))


def is_usable(record: Tlsa, *, read: bool = True) -> bool:
    """Whether a record has parameters for SMTP and data of their form.

    Without `read` a whole certificate or key is taken on trust.
    """
    if record.usage not in (DANE_TA, DANE_EE) or record.selector not in (CERTIFICATE, KEY):
        return False
    if record.matching != FULL:
        return DIGEST_BYTES.get(record.matching) == len(record.data)
    if not read:
        return bool(record.data)
    try:
        if record.selector == CERTIFICATE:
            key_part(record.data)
        elif element(record.data, 0, SEQUENCE)[1] != len(record.data):
            return False
    except ValueError:
        return False
    return True


def verify(records: TlsaSet, chain: Sequence[bytes], now: float) -> TlsFailure | None:
    """Why the certificates of a peer, DER, leaf first, match no record; None if one matches.

    `now` is in seconds since 1970. Never raises for what a peer sends.
    """
    if not records.records:
        return None
    if not chain:
        return TlsFailure(Reason.FAILURE, "the peer presented no certificate")
    presented = [Presented(der) for der in chain[:MAX_CERTIFICATES]]
    if _has_match(presented[0], records.records, DANE_EE):
        return None
    count = len(records.records)
    which = "the TLSA record" if count == 1 else f"any of the {count} TLSA records"
    which = f"{which} of {records.base_domain}"
    if not any(record.usage == DANE_TA for record in records.records):
        return TlsFailure(Reason.FAILURE, f"the certificate does not match {which}")
    names = {records.base_domain, *records.names}
    failure = _Walk(presented, records.records, names, now).run()
    if failure is None or failure.reason is not Reason.NOT_TRUSTED:
        return failure
    text = f"the certificate does not lead to {which}"
    return TlsFailure(failure.reason, f"{text}: {failure.text}" if failure.text else text)


def _has_match(certificate: Presented, records: Collection[Tlsa], usage: int) -> bool:
    """Whether a record of this usage stands for a certificate; the cost is that of four digests."""
    for selector, data in ((CERTIFICATE, certificate.der), (KEY, certificate.key)):
        if data and any(
            Tlsa(usage, selector, matching, value) in records
            for matching, value in (
                (FULL, data),
                (SHA256, hashlib.sha256(data).digest()),
                (SHA512, hashlib.sha512(data).digest()),
            )
        ):
            return True
    return False


# -- trust anchors ------------------------------------------------------------------------------


class _Walk:
    """Goes from the leaf along signatures, nearest certificates first, until an anchor is good.

    A certificate is reached once, so cross-signed ones cost no more than others.
    """

    def __init__(
        self,
        presented: Sequence[Presented],
        records: Collection[Tlsa],
        names: Collection[str],
        now: float,
    ) -> None:
        self._presented = presented
        self._records = records
        self._names = names
        self._now = EPOCH + timedelta(seconds=now)
        self._signatures = MAX_SIGNATURES
        self._best: TlsFailure | None = None
        self._note = ""

    def run(self) -> TlsFailure | None:
        """None if the chain is good, else the problem of the path that came furthest."""
        leaf = self._presented[0].read
        if isinstance(leaf, str):
            return TlsFailure(Reason.FAILURE, leaf)
        certificates, keys = self._anchors()
        unreached = [*self._presented[1:], *certificates]
        queue = [Step(leaf, None, self._presented[0])]
        for step in queue:  # grows
            if self._is_anchor(step, certificates) and self._is_good(step):
                return None
            for candidate in list(unreached):
                read = candidate.read
                if isinstance(read, str):
                    unreached.remove(candidate)
                    self._note = read
                elif read.subject == step.parsed.issuer and self._signs(read.certificate, step):
                    unreached.remove(candidate)
                    queue.append(Step(read, step, candidate))
        for step in reversed(queue):  # a bare key is most likely that of the last issuer
            for key in keys:
                if self._signs(key, step) and self._is_good(step, bare=True):
                    return None
        return self._best or TlsFailure(Reason.NOT_TRUSTED, self._note)

    def _anchors(self) -> tuple[list[Presented], list[object]]:
        """The certificates and the keys that records hold themselves."""
        full = sorted(r for r in self._records if r.usage == DANE_TA and r.matching == FULL)
        presented = {certificate.der for certificate in self._presented}
        certificates: list[Presented] = []
        keys: list[object] = []
        for record in full[:MAX_FULL]:
            if record.selector == CERTIFICATE:
                if record.data not in presented:
                    certificates.append(Presented(record.data))
            else:
                try:
                    keys.append(serialization.load_der_public_key(record.data))
                except Exception as error:  # as in `Presented.read`
                    self._note = f"a key in a record cannot be read: {shown(str(error))}"
        return certificates, keys

    def _is_anchor(self, step: Step, certificates: list[Presented]) -> bool:
        presented = step.presented
        return presented in certificates or _has_match(presented, self._records, DANE_TA)

    def _signs(self, signer: object, step: Step) -> bool:
        """Whether a key, or that of a certificate, made a signature; False beyond the budget."""
        if self._signatures <= 0:
            self._note = f"there are more than {MAX_SIGNATURES} signatures to check"
            return False
        self._signatures -= 1
        try:
            key = signer.public_key() if isinstance(signer, x509.Certificate) else signer
            return signed(step.parsed.certificate, key)
        except Exception as error:  # a key or an algorithm that the library does not know
            self._note = f"a signature cannot be checked: {shown(str(error))}"
            return False

    def _is_good(self, anchor: Step, *, bare: bool = False) -> bool:
        """Whether the path from an anchor down to the leaf holds; keeps the problem if not.

        `bare`: the anchor is a key of a record, which has signed the certificate of this step.
        """
        path = anchor.path()
        problem = next(problems(path, self._names, self._now, bare=bare), None)
        if problem is not None and self._best is None:
            self._best = problem
        return problem is None
