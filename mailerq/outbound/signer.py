"""Find the keys that sign mail, and make signatures.

Theory of operation
-------------------
What is known about a From domain is looked up again after `CHECK_SECONDS`, in a thread: so changed
files count without a reload. Domains, keys of messages and hashes of bodies are kept in bounded
numbers.

The recipients of one mail have the same body. Its hash is kept under the hash that Python makes of
the stored mail, which has a secret key and so cannot be forged from outside. A mail of more than
`KEPT_BYTES` is hashed each time, because Python's hash would hold the lock for too long.

A signature of RSA takes some 0.3 ms of processor time, and a sixth less while the code and the
tables for it are in the processor's caches. So the signatures that are due in a turn of the loop
are made at its end, one after the other, for at most `TURN_SECONDS`. Above `QUICK_SHARE` of the
time a thread makes what waits. A long body is hashed in a thread.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import trio

from mailerq.config import Config
from mailerq.errors import ConfigError, MessageError
from mailerq.mail._canonical import Body
from mailerq.mail.arc import Set, Verdict, message_field, results_field, seal_data, seal_field
from mailerq.mail.dkim import (
    HeaderFields,
    Terms,
    body_hash,
    signed_data,
    signed_field,
    unsigned_field,
)
from mailerq.mail.headers import HEADER_LIMIT
from mailerq.net.logs import Ration
from mailerq.outbound.sealing import Chains
from mailerq.rules.signing import (
    SigningFile,
    Source,
    keys_of_message,
    no_key_in_force,
    sources,
)
from mailerq.store.signing_keys import (
    KeyFiles,
    KeyProblem,
    SigningKey,
    has_directory,
    selectors_in,
)
from mailerq.turns import EndOfTurn
from mailerq.wire._lines import Buffer
from mailerq.wire.framing import BLOCK_BYTES, InBlocks, has_bare_newline, in_pairs

if TYPE_CHECKING:
    from mailerq.live import Live, Snapshot

__all__ = ["Found", "Ready", "Seal", "Signed", "Signer"]

T = TypeVar("T")

log = logging.getLogger("mailerq.delivery")

CHECK_SECONDS: Final = 5.0
"""How long what is known about the keys of a domain is used without a look at the files."""

MAX_DOMAINS: Final = 10_000
MAX_PEMS: Final = 1000
MAX_HASHES: Final = 4096
"""From domains, keys of messages, and hashes of bodies that are kept."""

KEPT_BYTES: Final = 1 << 23
"""Largest mail whose hash is kept: Python's hash of it takes some 3 ms."""

SHORT_BYTES: Final = 1 << 18
"""Larger bodies are hashed in a thread."""

JOINED_BYTES: Final = 1 << 20
"""Larger mail is not copied together with its signatures."""

LOOKERS: Final = 2
HASHERS: Final = 2
"""Threads for files of keys, and for long bodies."""

TURN_SECONDS: Final = 0.008
"""Time for signatures in one turn of the loop."""

QUICK_SHARE: Final = 0.5
QUICK_SECONDS: Final = 0.1
"""The loop makes signatures while they take up to this share of each such time."""

MAX_BATCH: Final = 64
"""Signatures that a thread makes in one go."""


class Ready(msgspec.Struct, frozen=True):
    """A key that can sign, and how."""

    source: Source
    key: SigningKey
    terms: Terms

    @classmethod
    def of(cls, source: Source, key: SigningKey) -> Ready:
        terms = source.options.terms(source.domain, source.selector, key.algorithm)
        return cls(source, key, terms)

    @property
    def label(self) -> str:
        return f"d={self.source.domain} s={self.source.selector} a={self.key.algorithm}"


class Found(msgspec.Struct, frozen=True):
    """What is known about a From domain at a time, on the monotonic clock.

    `problems` are those of keys that cannot be read, `keyless` the problem while none of `keys` is
    in force; empty for a domain that has no place for keys.
    """

    keys: tuple[Ready, ...] = ()
    problems: tuple[str, ...] = ()
    keyless: str = ""
    checked: float = 0.0

    def problems_at(self, now: float) -> tuple[str, ...]:
        """What keeps the mail from having all its signatures at a time."""
        if not self.keyless or any(ready.source.options.signs(now) for ready in self.keys):
            return self.problems
        return (*self.problems, self.keyless)


NOTHING: Final = Found()


class Seal(msgspec.Struct, frozen=True):
    """How to seal a mail: the key, the sets that it came with, and whether they hold."""

    ready: Ready
    sets: tuple[Set, ...]
    verdict: Verdict


class Signed:
    """A mail with fields above it, which is made block by block.

    All its CRs and LFs are pairs. Its length is that of the fields and of the mail as it is stored.
    """

    def __init__(self, fields: bytes, mail: bytes | InBlocks) -> None:
        self._fields = fields
        self._mail = mail

    def __len__(self) -> int:
        return len(self._fields) + len(self._mail)

    def blocks(self) -> Iterator[bytes]:
        """Yield the mail in pieces of any length. Callable again."""
        yield self._fields
        mail = self._mail
        if not isinstance(mail, bytes):
            yield from mail.blocks()
            return
        end = 0
        while end < len(mail):
            start, end = end, end + BLOCK_BYTES
            if mail.startswith(b"\r\n", end - 1):
                end += 1  # a pair stays whole
            block = mail[start:end]
            yield in_pairs(block) if has_bare_newline(block) else block


class Signer:
    """Finds keys and makes signatures, for all messages of a loop.

    `now` is the wall clock. Raises `ConfigError` if `dkim-file` cannot be used.
    """

    def __init__(self, live: Live, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self._live = live
        self._say_problem = Ration(log.error, 10, "and %d times more for keys that cannot sign")
        self._files = KeyFiles()
        self._domains: dict[str, Found] = {}
        self._flights: dict[str, trio.Event] = {}
        self._pems: dict[str, SigningKey | str] = {}
        self._hashes: dict[tuple[int, int, bool], bytes] = {}
        self._signatures = Signatures()
        self.chains = Chains()
        self._snapshot: Snapshot
        self._is_active: bool
        self._seen: object
        self._file = SigningFile.of(live.current.config)
        self._lookers = trio.CapacityLimiter(LOOKERS)
        self._hashers = trio.CapacityLimiter(HASHERS)
        self._renew()

    @property
    def config(self) -> Config:
        """The settings in force now."""
        return self._live.current.config

    @property
    def is_active(self) -> bool:
        """Whether settings name keys."""
        if self._live.current is not self._snapshot:
            self._renew()
        return self._is_active

    def _renew(self) -> None:
        """The settings are other ones."""
        self._snapshot, self._seen = self._live.current, None
        self._domains.clear()
        config = self._snapshot.config
        self._is_active = bool(config.dkim_directory or config.dkim_file)

    # Keys

    def known(self, domain: str) -> Found | None:
        """The keys for a From domain, if known; None: ask `find`."""
        if not (self.is_active and domain):
            return NOTHING
        found = self._domains.get(domain)
        return found if found is not None and monotonic() - found.checked < CHECK_SECONDS else None

    async def find(self, domain: str) -> Found:
        """Find the keys for a From domain, given as A-labels, or empty."""
        while True:
            found = self.known(domain)
            if found is not None:
                return found
            flight = self._flights.get(domain)
            if flight is None:
                break
            await flight.wait()
        snapshot = self._snapshot
        flight = self._flights[domain] = trio.Event()
        try:
            found = await trio.to_thread.run_sync(
                self._look, domain, snapshot.config, abandon_on_cancel=True, limiter=self._lookers
            )
        finally:
            del self._flights[domain]
            flight.set()
        is_deferred = snapshot.config.dkim_missing == "defer"
        then = "" if is_deferred else " (dkim-missing: unsigned, so the mail goes without)"
        for problem in found.problems_at(self.now()):
            self._say_problem("cannot sign mail from %s%s: %s", domain, then, problem)
        if snapshot is self._snapshot:
            domains = self._domains
            domains.pop(domain, None)
            if len(domains) >= MAX_DOMAINS:
                del domains[next(iter(domains))]
            domains[domain] = found
        return found

    def _look(self, domain: str, config: Config) -> Found:
        """Look at the files; in a thread."""
        began = monotonic()
        problems: list[str] = []
        keys: list[Ready] = []
        directory = config.dkim_directory
        try:
            file = self._followed(config)
            found = sources(file, domain, directory, lambda name: selectors_in(directory, name))
        except OSError as error:
            text = f"dkim-directory: cannot read {error.filename}: {error.strerror or error}"
            return Found((), (text,), "", began)
        now = self.now()
        for source in found:
            try:
                keys.append(Ready.of(source, self._files.get(source.path)))
            except KeyProblem as error:
                if source.options.is_in_force(now):
                    problems.append(f"the key {source.path} {error}")
        has = has_directory(directory, domain)
        keyless = no_key_in_force(file, domain, directory, found, has_directory=has)
        return Found(tuple(keys), tuple(problems), keyless, began)

    def _followed(self, config: Config) -> SigningFile:
        """The lines of `dkim-file`, read again if it has changed; the last good ones, if bad."""
        path = config.dkim_file
        try:
            status = None if not path else _status(path)
            seen = (path, config.dkim_directory, status)
            if seen != self._seen:
                self._file = SigningFile.of(config)
                self._seen = seen
        except ConfigError as error:
            self._say_problem("dkim-file stays as it was: %s", error)
        return self._file

    async def learn(self, wish: object) -> None:
        """Read the keys in the property ``dkim`` of a message in a thread, where they are new."""
        new = self._unread(wish)
        if new:
            read = await self._in_thread(_read_pems, new)
            for pem, key in read.items():
                if len(self._pems) >= MAX_PEMS:
                    del self._pems[next(iter(self._pems))]
                self._pems[pem] = key

    def knows(self, wish: object) -> bool:
        """Whether `keys_of` reads no new key."""
        return wish is None or not self._unread(wish)

    def _unread(self, wish: object) -> set[str]:
        try:
            return {each.pem for each in keys_of_message(wish)} - self._pems.keys()
        except MessageError:
            return set()  # `keys_of` says what is wrong

    def keys_of(self, wish: object) -> list[Ready]:
        """The keys in the property ``dkim`` of a message, which are known.

        Raises `MessageError`.
        """
        ready = []
        for source in keys_of_message(wish):
            key = self._pems.get(source.pem)
            if key is None:  # there was no room for all
                key = _read_pems((source.pem,))[source.pem]
            if isinstance(key, str):
                raise MessageError(f"property dkim: the key of {source.name} {key}")
            ready.append(Ready.of(source, key))
        return ready

    # Signatures

    async def sign(
        self,
        keys: Sequence[Ready],
        fields: HeaderFields,
        sent: bytes | InBlocks,
        *,
        binary: bool,
        shared: bool,
        seal: Seal | None = None,
    ) -> bytes | InBlocks:
        """Return a mail with its signatures, and a seal, above it.

        `sent` is the mail as it goes out; `fields` may be those of that mail, or of what it was
        made of. `binary`: the mail goes byte for byte. `shared`: others may have the same mail.
        """
        forms = {ready.terms.relaxed_body for ready in keys}
        if seal is not None:
            forms.add(seal.ready.terms.relaxed_body)
        if not isinstance(sent, bytes):
            fields, hashes = await self._in_thread(_read_blocks, sent, forms)
        else:
            if binary and has_bare_newline(sent[: fields.body]):
                # Peers would not agree about the fields of such a header.
                sent = in_pairs(sent[: fields.body]) + sent[fields.body :]
            if fields.mail is not sent:
                fields = HeaderFields(sent)
            hashes = {}
            for relaxed in forms:
                found = self._hash_of(sent, fields.body, relaxed, binary, shared)
                if found is None:
                    body = memoryview(sent)[fields.body :]
                    found = await self._in_thread(_hash_long, body, relaxed, binary)
                    if shared and not binary:
                        self._keep_hash(sent, relaxed, found)
                hashes[relaxed] = found
        now = self.now()
        unsigned: list[bytes] = []
        due: list[Due] = []
        for ready in keys:
            terms = ready.terms
            names = fields.names(terms.extra)
            field = unsigned_field(terms, names, hashes[terms.relaxed_body], now)
            data = signed_data(fields, names, field, relaxed=terms.relaxed_header)
            unsigned.append(field)
            due.append((ready.key, data))
        above = b""
        if due:
            signatures = await self._signatures.make(due)
            above = b"".join(map(signed_field, unsigned, signatures))
        if seal is not None:
            head = above + fields.mail[: fields.body]
            if len(head) > SHORT_BYTES:
                header = await self._in_thread(HeaderFields, head)
            else:
                header = HeaderFields(head)
            hash = hashes[seal.ready.terms.relaxed_body]
            above = await self._seal(seal, header, hash, now) + above
        if not isinstance(sent, bytes):
            return Signed(above, sent)
        if len(sent) <= JOINED_BYTES:
            return above + sent
        if binary:
            return await self._in_thread(_join, above, sent)
        return Signed(above, sent)

    async def _seal(self, seal: Seal, fields: HeaderFields, hash: bytes, now: float) -> bytes:
        """Return the next ARC set of a mail as it leaves."""
        terms, key, verdict = seal.ready.terms, seal.ready.key, seal.verdict
        number = len(seal.sets) + 1
        results = results_field(number, self.config.hostname, verdict)
        field, data = message_field(number, terms, fields, hash, now)
        (signature,) = await self._signatures.make([(key, data)])
        message = signed_field(field, signature)
        field = seal_field(number, terms, verdict, now)
        # A seal on a broken chain covers its own set alone (RFC 8617, section 5.1.2).
        before = seal.sets if verdict == "pass" else ()
        data = seal_data(before, results, message, field)
        (signature,) = await self._signatures.make([(key, data)])
        return signed_field(field, signature) + message + results

    def _hash_of(
        self, mail: bytes, start: int, relaxed: bool, binary: bool, shared: bool
    ) -> bytes | None:
        """The hash of a body that starts at `start`; None if a thread has to make it."""
        if shared and not binary and len(mail) <= KEPT_BYTES:
            found = self._hashes.get((len(mail), hash(mail), relaxed))
            if found is not None:
                return found
        if len(mail) - start > SHORT_BYTES:
            return None
        made = body_hash((memoryview(mail)[start:],), relaxed=relaxed, binary=binary)
        if shared and not binary:
            self._keep_hash(mail, relaxed, made)
        return made

    def _keep_hash(self, mail: bytes, relaxed: bool, made: bytes) -> None:
        kept = self._hashes
        if len(mail) > KEPT_BYTES:
            return
        if len(kept) >= MAX_HASHES:
            del kept[next(iter(kept))]
        kept[len(mail), hash(mail), relaxed] = made

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(
            work, *arguments, abandon_on_cancel=True, limiter=self._hashers
        )


def _status(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # `SigningFile.of` says what is wrong
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read_pems(pems: Iterable[str]) -> dict[str, SigningKey | str]:
    """Read keys; the text of one that cannot be read says why."""
    read: dict[str, SigningKey | str] = {}
    for pem in pems:
        try:
            read[pem] = SigningKey(pem.encode(errors="replace"))
        except KeyProblem as error:
            read[pem] = str(error)
    return read


def _hash_long(body: memoryview, relaxed: bool, binary: bool) -> bytes:
    return body_hash((body,), relaxed=relaxed, binary=binary)


def _read_blocks(mail: InBlocks, forms: Collection[bool]) -> tuple[HeaderFields, dict[bool, bytes]]:
    """The header of a mail that is made block by block, and the hashes of its body."""
    head = bytearray()
    fields: HeaderFields | None = None
    digests = {relaxed: hashlib.sha256() for relaxed in forms}
    bodies = [Body(digests[relaxed], relaxed=relaxed) for relaxed in forms]

    def begin() -> HeaderFields:
        found = HeaderFields(bytes(head))
        for body in bodies:
            body.add(memoryview(found.mail)[found.body :])
        return found

    for block in mail.blocks():
        if fields is None:
            looked = max(len(head) - 3, 0)
            head += block
            if head.find(b"\r\n\r\n", looked) >= 0 or len(head) > 2 * HEADER_LIMIT:
                fields = begin()
        else:
            for body in bodies:
                body.add(block)
    if fields is None:
        fields = begin()
    for body in bodies:
        body.end()
    return fields, {relaxed: digest.digest() for relaxed, digest in digests.items()}


def _join(above: bytes, mail: bytes) -> bytes:
    """Join a long mail with its signatures; Python's lock is released."""
    whole = Buffer(len(above) + len(mail))
    whole.add(above)
    whole.add(mail)
    return whole.take()


Due = tuple[SigningKey, bytes]
"""A signature to be made: the key, and the text to sign."""


class _Request:
    """The signatures that a task waits for."""

    __slots__ = ("due", "error", "signatures", "task")

    def __init__(self, due: Sequence[Due]) -> None:
        self.due = due
        self.signatures: list[bytes] = []
        self.error: Exception | None = None
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

    def sign_one(self) -> bool:
        """Make the next signature, in any thread; return whether the task can go on."""
        key, data = self.due[len(self.signatures)]
        try:
            self.signatures.append(key.sign(data))
        except Exception as error:
            self.error = error  # the task raises it
        return self.error is not None or len(self.signatures) == len(self.due)

    def wake(self) -> None:
        """Wake the task, unless it has given up."""
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def give_up(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Signatures:
    """Makes signatures: at the end of a turn while that takes little time, else in a thread."""

    def __init__(self) -> None:
        self._began = 0.0
        self._spent = 0.0
        self._waiting: list[_Request] = []
        self._is_due = False
        self._is_running = False
        self._limiter = trio.CapacityLimiter(1)

    async def make(self, due: Sequence[Due]) -> Sequence[bytes]:
        """Return the signatures of texts, in their order."""
        request = _Request(due)
        self._waiting.append(request)
        if not (self._is_due or self._is_running):
            self._make_due()
        await trio.lowlevel.wait_task_rescheduled(request.give_up)
        if request.error is not None:
            raise request.error
        return request.signatures

    def _make_due(self) -> None:
        self._is_due = True
        EndOfTurn.of_this_loop().call(self._make_some)

    def _make_some(self, idle: bool) -> bool:
        """Make signatures while there is time for them; the others wait for a turn or a thread."""
        self._is_due = False
        now = monotonic()
        if now - self._began > QUICK_SECONDS:
            self._began, self._spent = now, 0.0
        left = QUICK_SHARE * QUICK_SECONDS - self._spent
        end = now + min(left, TURN_SECONDS)
        waiting = self._waiting
        while waiting and monotonic() < end:
            request = waiting[0]
            if request.task is None or request.sign_one():
                del waiting[0]
                request.wake()
        spent = monotonic() - now
        self._spent += spent
        if self._waiting and spent < left:
            self._make_due()
        elif self._waiting:
            self._is_running = True
            trio.lowlevel.spawn_system_task(self._run)
        return True

    async def _run(self) -> None:
        """Have a thread make what waits, and wake each task as soon as its signatures are there.

        A system task, because any of the waiting tasks may be cancelled.
        """
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                batch = [request for request in batch if request.task is not None]
                try:
                    await trio.to_thread.run_sync(_sign_all, batch, limiter=self._limiter)
                except Exception as error:  # there are no more threads
                    for request in batch:
                        request.error = error
                for request in batch:
                    request.wake()
        finally:
            self._is_running = False


def _sign_all(batch: Sequence[_Request]) -> None:
    for request in batch:
        while not request.sign_one():
            pass
