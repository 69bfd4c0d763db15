"""Find the TLSA records of hosts, and say whether DANE is in force here (RFC 7672).

`mailerq.outbound.policies.Dane` says how `Dane` is used. The resolver knows what is proved; the
rules are in `mailerq.rules.dane`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from mailerq.net.dns_client import MALFORMED, NoAnswer
from mailerq.rules.security import PolicyUnknown, Tlsa, TlsaSet, TlsFailure

if TYPE_CHECKING:
    from mailerq.net.resolver import Resolver

__all__ = ["Dane", "Standing"]

log = logging.getLogger("mailerq.delivery")

MAX_NAME: Final = 253
"""Characters of a domain name."""

PROBED: Final = "."
"""The root zone is signed, so a resolver that validates says so of its name servers."""

DENIED: Final = "_25._tcp"
"""There is no such top-level domain, and the root zone proves that."""

PROBE_SECONDS: Final = 5.0
"""How long a probe waits for answers."""

HOST_SECONDS: Final = 2.0
"""Time limit for the question whether DNSSEC proves the addresses of a smarthost."""

AGAIN_SECONDS: Final = 60.0
"""How long after a probe without an answer the next one is."""


class Standing(NamedTuple):
    """Whether DANE is in force, in a sentence; `setting` is the key that decides this, if one does.

    `faulty`: the resolver behaves so that mail waits, or goes unprotected, for no good reason.
    `unknown`: the resolver has not answered.
    """

    in_force: bool
    text: str
    setting: str = ""
    faulty: bool = False
    unknown: bool = False


class Dane:
    """Finds and applies TLSA records. Runs on the home worker."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def is_secure(self, domain: str) -> bool:
        """Whether DNSSEC proves the MX records of a domain, or that it has none.

        Raises `PolicyUnknown` if that cannot be known now.
        """
        return bool(await self._proved_names(domain))

    async def is_proved(self, host: str) -> bool:
        """Whether DNSSEC proves the addresses of a host, or an alias, that the operator has named.

        False if the DNS does not answer: the name may be only in ``/etc/hosts``.
        """
        if not self.standing().in_force:
            return False
        with trio.move_on_after(HOST_SECONDS):
            bases = await self._resolver.tlsa_bases(host)
            return isinstance(bases, tuple) and bool(bases)
        return False

    async def names(self, domain: str) -> tuple[str, ...]:
        """The names of a secure domain that count in certificates of its hosts.

        There are some only if a host has a record for which they count (usage 2), so that other
        domains with the same hosts share connections. Raises `PolicyUnknown`.
        """
        names = await self._proved_names(domain)
        found = await self._resolver.mail_hosts(domain) if names else ()
        if not isinstance(found, tuple):
            return ()
        port, count = self._resolver.config.smtp_out_port, list[bool]()

        async def look(host: str) -> None:
            try:
                records = await self.tlsa(host, port, names)
            except PolicyUnknown:
                return  # The host is not used either.
            count.append(records is not None and bool(records.names))

        async with trio.open_nursery() as nursery:
            for host in dict.fromkeys(host.name for host in found):
                nursery.start_soon(look, host)
        return names if any(count) else ()

    async def tlsa(self, host: str, port: int, names: Iterable[str] = ()) -> TlsaSet | None:
        """The usable TLSA records of a host of a secure domain, or None if it has none.

        `names` count besides those of the host where an authority has issued the certificate.
        Returns a set without records if there are some and none is usable. Raises `PolicyUnknown`:
        the host must not be used then (RFC 7672, section 2.1.2).
        """
        from mailerq.rules.dane import tlsa_set

        bases = await self._resolver.tlsa_bases(host)
        if isinstance(bases, str):
            raise PolicyUnknown(
                f"its addresses cannot be known, nor if DNSSEC proves them: {bases}"
            )
        for base in bases:
            name = f"_{port}._tcp.{base}"
            if len(name) > MAX_NAME:
                continue
            answer = await self._resolver.answer(name, "TLSA")
            if isinstance(answer, str):
                raise PolicyUnknown(f"its TLSA records cannot be known: {answer}")
            if answer.secure and answer.records:
                return tlsa_set(base, map(_tlsa, answer.records), names)
        return None

    async def _proved_names(self, domain: str) -> tuple[str, ...]:
        names = await self._resolver.proved_names(domain)
        if isinstance(names, str):
            raise PolicyUnknown(
                f"its MX records cannot be known, nor if DNSSEC proves them: {names}"
            )
        return names

    def verify(self, records: TlsaSet, chain: Sequence[bytes], *, now: float) -> TlsFailure | None:
        """Why a certificate chain in DER, the peer's own first, does not match; None if it does.

        `now` is in seconds since 1970. Bounded in time for any chain.
        """
        from mailerq.rules.dane import verify

        return verify(records, chain, now)

    # Whether it is in force

    def standing(self) -> Standing:
        """Whether the settings let DANE be in force; asks nobody."""
        config = self._resolver.config
        if not config.dane:
            return Standing(False, "DANE is off", "dane")
        try:
            reason = self._resolver.untrusted()
        except NoAnswer as error:
            return Standing(False, f"DANE is off: {error}")
        if reason:
            text = (
                f"DANE is off: {reason}. Run a validating resolver on this host, or set"
                " dns-validator: unbound; dns-trust-ad: true if that network is safe"
            )
            return Standing(False, text, "dns-servers" if config.dns_servers else "")
        if config.dns_validator == "unbound":
            return Standing(True, "DANE is in force: this process validates", "dns-validator")
        trusted = "dns-trust-ad" if config.dns_trust_ad else ""
        return Standing(True, "DANE is in force where the resolver validates", trusted)

    async def probe(self) -> Standing:
        """`standing`, and what two questions say about the resolver. Nothing depends on it."""
        standing = self.standing()
        if not standing.in_force:
            return standing
        with trio.move_on_after(PROBE_SECONDS):
            return await self._probe(standing)
        return _silent(standing, f"no answer in {PROBE_SECONDS:g} s")

    async def _probe(self, standing: Standing) -> Standing:
        root = await self._resolver.answer(PROBED, "NS")
        if isinstance(root, str):
            return _silent(standing, root)
        if not root.secure:
            text = (
                "DANE has no effect: the resolver does not validate, as it does not say that the"
                " root zone is proved. Turn on DNSSEC there, or set dns-validator: unbound"
            )
            return Standing(False, text, standing.setting)
        denied = await self._resolver.answer(DENIED, "TLSA")
        problem = ""
        if isinstance(denied, str):
            problem = f"does not answer when asked for TLSA records that do not exist ({denied})"
        elif denied.records:
            problem = "makes up records that do not exist"
        elif not denied.secure:
            problem = "does not say that it is proved when records do not exist"
        if problem:
            text = (
                f"DANE is in force, but the resolver mangles negative answers: it {problem}. Mail"
                " to domains with DNSSEC may wait. Use another resolver, or set dane: false"
            )
            return Standing(True, text, standing.setting, faulty=True)
        text = "DANE is in force: the resolver validates"
        if standing.setting == "dns-validator":
            text = standing.text
        return Standing(True, text, standing.setting)

    async def say(self) -> None:
        """Probe until the resolver answers, and write to the log what came of it."""
        while (standing := await self.probe()).unknown:
            log.warning("%s", standing.text)
            await trio.sleep(AGAIN_SECONDS)
        log.log(logging.WARNING if standing.faulty else logging.INFO, "%s", standing.text)


def _silent(standing: Standing, reason: str) -> Standing:
    text = f"DANE cannot be in force now: the resolver does not answer: {reason}"
    return Standing(False, text, standing.setting, unknown=True)


def _tlsa(record: Any) -> Tlsa:
    """The record; one that is malformed is unusable."""
    if record is MALFORMED:
        return Tlsa(-1, -1, -1, b"")
    return Tlsa(record.usage, record.selector, record.mtype, record.cert)
