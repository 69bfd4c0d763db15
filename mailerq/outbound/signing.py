"""The signatures of one message, from the search for its keys to the signed mail.

Theory of operation
-------------------
A message that may be signed has a `Signing`. `prepare` finds the keys before the envelope goes out:
the size that is announced then includes the signatures, and mail whose keys cannot be used costs no
transaction. `sign` comes last, after plugins and conversions, because it has to see what the peer
gets. If a plugin has exchanged the mail or the property ``dkim``, the keys are found anew.

A mail that was received and goes on gets an ARC seal after its signatures, if `arc-seal` asks for
that and a key is for ARC (`mailerq.outbound.sealing`).

A mail without From is not signed: every signature covers From (RFC 6376, section 5.4). Nor is one
whose header does not end within the limit of a header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import MessageError
from mailerq.mail.dkim import HeaderFields, field_size
from mailerq.mail.headers import boundaries
from mailerq.outbound.signer import Found, Ready, Seal, Signer
from mailerq.rules import responses
from mailerq.rules.responses import Outcome
from mailerq.rules.signing import MAX_KEYS, from_domain
from mailerq.wire.framing import InBlocks

if TYPE_CHECKING:
    from mailerq.net.tracing import Tap
    from mailerq.outbound.jobs import Job

__all__ = ["Signing"]

SEAL_BYTES: Final = 400
"""What the other two fields of an ARC set take."""

SHORT_HEADER: Final = 1 << 16
"""Longer headers are read in a thread."""


class Signing:
    """The signatures of one message. Use it on the loop's thread."""

    __slots__ = (
        "_arc_keys", "_fields", "_mail", "_problem", "_seal", "_signer", "_wish", "is_prepared",
        "keys", "size",
    )  # fmt: skip

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._mail: bytes | None = None
        self._wish: object = None
        self._fields: HeaderFields | None = None
        self._problem: Outcome | None = None
        self._arc_keys: list[Ready] = []
        self._seal: Seal | None = None
        self.keys: tuple[Ready, ...] = ()
        """The keys that sign now."""
        self.size = 0
        """Bytes of their signatures, as far as that is known before the mail is converted."""
        self.is_prepared = False

    def forget(self) -> None:
        """Keep nothing of the mail: its body leaves memory."""
        self._mail = self._fields = None
        self.is_prepared = False

    @property
    def words(self) -> str:
        """What signs the mail, for people."""
        words = [ready.label for ready in self.keys]
        if self._seal is not None:
            words.append(f"ARC {self._seal.ready.label} cv={self._seal.verdict}")
        return "; ".join(words)

    async def prepare(self, job: Job, mail: bytes | None) -> Outcome | None:
        """Find the keys for the mail of a job; return what keeps them from signing.

        `mail` is None if only a plugin can supply it.
        """
        if not self.prepare_now(job, mail):
            assert mail is not None, "else there is nothing to find"
            bounds = boundaries(mail)
            if bounds[0] > SHORT_HEADER:
                fields = await trio.to_thread.run_sync(HeaderFields, mail, bounds)
            else:
                fields = HeaderFields(mail, bounds)
            await self._signer.learn(job.message.properties.get("dkim"))
            self._set(job, fields, await self._signer.find(from_domain(fields)))
            if self._arc_keys and self._problem is None:
                await self._find_seal(job, fields)
        return self._problem

    async def _find_seal(self, job: Job, fields: HeaderFields) -> None:
        """Check the chain that a mail came with, and choose the key of the next seal."""
        stored = job.source[1]
        came = fields if stored is None or stored is fields.mail else HeaderFields(stored)
        judged = await self._signer.chains.judge(came)
        if judged.is_open and judged.verdict is not None:
            self._seal = Seal(self._arc_keys[0], judged.chain.sets, judged.verdict)
            key = self._seal.ready
            names = fields.names(key.terms.extra)
            self.size += SEAL_BYTES + 2 * field_size(key.terms, names, key.key.size)

    def prepare_now(self, job: Job, mail: bytes | None) -> bool:
        """Do `prepare` if that takes no time; False: it does, or it finds a problem."""
        wish = job.message.properties.get("dkim")
        self._problem = None
        if mail is None or not (self._signer.is_active or wish is not None):
            self._mail, self._wish, self._fields = mail, wish, None
            self.keys, self.size, self.is_prepared = (), 0, True
            self._arc_keys, self._seal = [], None
            return True
        bounds = boundaries(mail)
        if bounds[0] > SHORT_HEADER or not self._signer.knows(wish):
            return False
        fields = HeaderFields(mail, bounds)
        found = self._signer.known(from_domain(fields))
        if found is None:
            return False
        self._set(job, fields, found)
        if self._arc_keys:
            self.is_prepared = False  # the chain is still to be checked
        return self.is_prepared

    def _set(self, job: Job, fields: HeaderFields, found: Found) -> None:
        signer, wish = self._signer, job.message.properties.get("dkim")
        self._mail, self._wish, self._fields = fields.mail, wish, fields
        self.keys, self.size, self.is_prepared = (), 0, False
        self._arc_keys, self._seal = [], None
        try:
            own = signer.keys_of(wish)
        except MessageError as error:
            self._problem = responses.unsendable(str(error))
            return
        now = signer.now()
        problems = found.problems_at(now)
        if problems and signer.config.dkim_missing == "defer":
            self._problem = responses.cannot_sign(problems[0])
            return
        self.is_prepared = True
        ready_keys = (*found.keys, *own) if own else found.keys
        if not ready_keys or b"from" not in fields or not fields.is_whole:
            return
        keys = [ready for ready in ready_keys if ready.source.options.signs(now)]
        if len(keys) > 1:
            keys.sort(key=_priority)
        self.keys = tuple(keys[:MAX_KEYS])
        if signer.config.arc_seal and _was_passed_on(job):
            self._arc_keys = [ready for ready in ready_keys if _seals(ready, now)]
        for ready in self.keys:
            names = fields.names(ready.terms.extra)
            self.size += field_size(ready.terms, names, ready.key.size)

    async def sign(
        self, job: Job, mail: bytes, sent: bytes | InBlocks, takes_binary: bool, tap: Tap | None
    ) -> bytes | InBlocks | Outcome:
        """Return a mail with its signatures, or what keeps it from being signed.

        `mail` is what plugins have left of the mail of a job, `sent` the same or what that was
        converted to. `takes_binary`: the peer takes mail byte for byte. A `tap` is told the keys.
        """
        wish = job.message.properties.get("dkim")
        if not self.is_prepared or self._mail is not mail or self._wish is not wish:
            problem = await self.prepare(job, mail)
            if problem is not None:
                return problem
        if not (self.keys or self._seal) or self._fields is None:
            return sent
        if tap is not None:
            tap.note(f"signed by {self.words}")
        shared = job.made is None and mail is job.unmade
        binary = takes_binary and job.message.properties.get("binarymime") is True
        return await self._signer.sign(
            self.keys, self._fields, sent, binary=binary, shared=shared, seal=self._seal
        )


def _seals(ready: Ready, now: float) -> bool:
    options = ready.source.options
    return "arc" in options.protocols and options.is_in_force(now)


def _was_passed_on(job: Job) -> bool:
    """Whether a mail came from another host, and not from a client that has logged in."""
    connection = job.message.properties.get("connection")
    return isinstance(connection, dict) and not connection.get("user")


def _priority(ready: Ready) -> int:
    return ready.source.options.priority
