"""Keep bodies under keys: `Storage.put` and `Storage.get`, over a `Backend` that does the work.

Theory of operation
-------------------
A body gets the key that `mailerq.storage.keys` makes of it. Puts that come while others are being
written are written together, because a disk syncs many files nearly as fast as one. One of the
waiting tasks writes for all of them; there is no task for that.

Many messages can name one body. Simultaneous gets of a key ask the backend once, and bodies that
were put or fetched lately are kept in memory.

Guarantees
----------
- When `put` returns, the body survives a crash of the backend. A crash before leaves at most a body
  that nobody names, until that expires.
- Both are bounded by ``storage-timeout``. A backend that is away, slow or full raises
  `StorageError`, and mail waits.
- `BodyMissing` is raised only for a body that was there too long, or that an application never put,
  or put wrongly. A body of ours that is missing or damaged before its time raises `StorageError`:
  perhaps a file system is not mounted, or a server answers for another one.
- All methods are called on the loop that opened the storage.
"""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import trio

from mailerq.config import Config
from mailerq.errors import BodyMissing, StorageError
from mailerq.escaping import escape
from mailerq.net.logs import Ration
from mailerq.storage.keys import MAX_DEPTH, ends_of, is_ours, key_for, key_problem
from mailerq.storage.packing import MAGIC, Unusable, pack, unpack

__all__ = ["Backend", "Body", "Storage"]

log = logging.getLogger("mailerq.storage")

T = TypeVar("T")

BATCH_BODIES: Final = 100
BATCH_BYTES: Final = 32 << 20
"""What is written together at most; one body may be larger."""

CACHE_BYTES: Final = 16 << 20
"""Bodies in memory that were put or fetched lately."""

CACHE_SECONDS: Final = 60.0
"""How long the body of an application's key is believed to be the same."""

SMALL_BYTES: Final = 1 << 16
"""Larger bodies are hashed and packed in a thread."""

EXPIRE_SECONDS: Final = 300.0
"""Time between two looks for expired bodies."""

GRACE_SECONDS: Final = 300.0
"""An hour counts as over this much later: the clocks of several machines differ."""


DOUBT_SECONDS: Final = 6 * 3600.0
LINES_PER_MINUTE: Final = 30


class Body(NamedTuple):
    """A body as the backend stores it. `expires` is in seconds since 1970."""

    key: str
    data: bytes
    expires: float


class Backend(ABC):
    """One kind of storage. Methods raise `StorageError`, and may be cancelled at any time."""

    name = ""
    """For people, without secrets."""

    compress = False
    depth = 0
    """Levels of folders in a bucket."""

    batch_bodies = BATCH_BODIES
    """Bodies that are written together at most."""

    @abstractmethod
    async def put(self, bodies: Sequence[Body]) -> None:
        """Store bodies, so that they survive a crash; a key that is there is written again."""

    @abstractmethod
    async def get(self, key: str) -> bytes | None:
        """What is stored under a key, None if nothing is."""

    async def set_aside(self, key: str) -> str:
        """Keep a damaged body for people, where `get` does not find it; say where, if anywhere."""
        return ""

    @abstractmethod
    async def expire(self, now: float) -> int:
        """Remove what has expired; return the number of buckets or bodies."""

    @abstractmethod
    def configure(self, config: Config) -> None:
        """Take the settings in force; called before each use."""

    async def close(self) -> None:  # noqa: B027
        """Close connections. Nothing is under way."""


class _Waiting:
    """A body to be written. `event` is set when that is done, or when its task has to write."""

    __slots__ = ("body", "error", "event", "taken", "written")

    def __init__(self, body: Body) -> None:
        self.body = body
        self.event = trio.Event()
        self.taken = self.written = False
        self.error: StorageError | None = None


class Storage:
    """A storage, see the module. `config` returns the settings in force."""

    def __init__(
        self,
        backend: Backend,
        config: Callable[[], Config],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = backend.name
        self._backend = backend
        self._config = config
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._writers = 0
        self._flights: dict[str, trio.Event] = {}
        self._cache: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._cached = 0
        self._problems: dict[str, str] = {}
        """What fails now, to put, fetch or remove bodies. The log says that once."""
        self._say_error = Ration(log.error, LINES_PER_MINUTE, "and %d times more")
        self._say_works = Ration(log.info, LINES_PER_MINUTE, "and %d times more")
        self._seen = clock(), trio.current_time()
        """A trusted wall-clock time, and the monotonic time at that moment."""
        self._doubted: float | None = None
        self._puts = self._gets = self._hits = self._errors = self._missing = 0

    async def run(self) -> None:
        """Remove expired bodies from time to time, until cancelled."""
        while True:
            try:
                self._backend.configure(self._config())
                removed = await self._backend.expire(self._expired_at())
            except StorageError as error:
                self._failed("remove", error)
            except Exception:
                # Our own defect must not end the deliveries.
                log.exception("%s: expired bodies cannot be removed", self.name)
            else:
                self._works("remove")
                if removed:
                    log.info("%s: %d expired, and are removed", self.name, removed)
            # Several processes share the storage.
            await trio.sleep(EXPIRE_SECONDS * random.uniform(0.8, 1.2))

    def statistics(self) -> dict[str, Any]:
        """Totals since the start, for people."""
        return {
            "address": self.name,
            "put": self._puts,
            "fetched": self._gets,
            "from_memory": self._hits,
            "missing": self._missing,
            "failed": self._errors,
            **({"problems": list(self._problems.values())} if self._problems else {}),
        }

    @property
    def is_away(self) -> bool:
        """Whether the last try to fetch a body has failed."""
        return "fetch" in self._problems

    def _failed(self, work: str, error: StorageError) -> None:
        self._errors += 1
        if work not in self._problems:
            self._say_error("%s", error)
        self._problems[work] = str(error)

    def _works(self, work: str) -> None:
        if self._problems.pop(work, ""):
            self._say_works("%s works again, to %s bodies", self.name, work)

    def _expired_at(self) -> float:
        """The time up to which bodies have expired, seconds since 1970.

        A wall clock that was set forward is believed after `DOUBT_SECONDS`: bodies that are removed
        because of a wrong clock do not come back.
        """
        now, steady = self._clock(), trio.current_time()
        wall, then = self._seen
        expected = wall + steady - then
        if now <= expected + GRACE_SECONDS:
            self._seen, self._doubted = (now, steady), None
            return now - GRACE_SECONDS
        if self._doubted is None:
            self._doubted = steady
            log.warning(
                "the clock was set forward by %.0f seconds: %s removes nothing because of that for"
                " %.0f hours", now - expected, self.name, DOUBT_SECONDS / 3600,
            )  # fmt: skip
        elif steady - self._doubted > DOUBT_SECONDS:
            self._seen, self._doubted = (now, steady), None
            return now - GRACE_SECONDS
        return expected - GRACE_SECONDS

    def _late(self, seconds: float) -> StorageError:
        return StorageError(
            f"{self.name} has not answered in {seconds:g} s (storage-timeout); mail waits for it"
        )

    # Put

    async def put(self, body: bytes, until: float) -> str:
        """Store a body that is needed until `until`, seconds since 1970; return its key.

        Raises `StorageError`, and then the body may be there or not.
        """
        make = partial(self._packed, body, until)
        made = await trio.to_thread.run_sync(make) if len(body) > SMALL_BYTES else make()
        waiting = _Waiting(made)
        self._waiting.append(waiting)
        while not waiting.written:
            if not waiting.taken and self._writers < self._config().storage_threads:
                await self._write()  # the first ones, perhaps not this one
            else:
                await self._wait_turn(waiting)
        if waiting.error is not None:
            raise StorageError(str(waiting.error)) from waiting.error
        self._keep(made.key, body)
        return made.key

    async def _wait_turn(self, waiting: _Waiting) -> None:
        """Wait until a body is written, or its task may write."""
        waiting.event = trio.Event()
        try:
            await waiting.event.wait()
        except BaseException:
            if not waiting.taken:
                self._waiting.remove(waiting)
                if waiting.event.is_set():
                    self._next_writer()
            raise

    def _packed(self, body: bytes, until: float) -> Body:
        key = key_for(body, until, min(self._backend.depth, MAX_DEPTH))
        expires = ends_of(key)
        assert expires is not None, "the key is ours"
        return Body(key, pack(body, compress=self._backend.compress), expires)

    async def _write(self) -> None:
        """Write what waits; others wait for that, so the caller cannot be cancelled meanwhile."""
        group: list[_Waiting] = []
        size = 0
        while self._waiting and len(group) < self._backend.batch_bodies:
            size += len(self._waiting[0].body.data)
            if group and size > BATCH_BYTES:
                break
            waiting = self._waiting.pop(0)
            waiting.taken = True
            group.append(waiting)
        config = self._config()
        seconds = config.storage_timeout
        error: StorageError | None = None
        self._writers += 1
        try:
            with trio.move_on_after(seconds, shield=True) as scope:
                self._backend.configure(config)
                await self._backend.put([waiting.body for waiting in group])
            if scope.cancelled_caught:
                error = self._late(seconds)
        except StorageError as problem:
            error = problem
        except Exception as problem:
            error = StorageError(f"{self.name}: {problem}; this is a defect")
            log.exception("bodies cannot be stored")
        finally:
            self._writers -= 1
            for waiting in group:
                waiting.written = True
                waiting.error = error
                waiting.event.set()
            self._next_writer()
        if error is not None:
            self._failed("put", error)
        else:
            self._puts += len(group)
            self._works("put")

    def _next_writer(self) -> None:
        for waiting in self._waiting:
            if not waiting.event.is_set():
                waiting.event.set()
                return

    # Get

    async def get(self, key: str) -> bytes:
        """Fetch a body. Raises `StorageError` for now, `BodyMissing` for good."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if problem := key_problem(key):
            self._missing += 1
            raise BodyMissing(f"the key {escape(key[:80])!r} {problem}")
        while True:
            if (body := self.at_hand(key)) is not None:
                return body
            flight = self._flights.get(key)
            if flight is None:
                break
            await flight.wait()
        flight = self._flights[key] = trio.Event()
        try:
            body = await self._fetch(key)
        except StorageError as error:
            self._failed("fetch", error)
            raise
        except BodyMissing:
            self._missing += 1
            raise
        finally:
            del self._flights[key]
            flight.set()
        self._gets += 1
        self._works("fetch")
        self._keep(key, body)
        return body

    async def _fetch(self, key: str) -> bytes:
        config = self._config()
        seconds = config.storage_timeout
        self._backend.configure(config)
        stored: bytes | None = None
        with trio.move_on_after(seconds) as scope:
            stored = await self._backend.get(key)
        if scope.cancelled_caught:
            raise self._late(seconds)
        if stored is None:
            ends = ends_of(key)
            if ends is not None and self._clock() < ends:
                raise StorageError(
                    f"{self.name} has no body {key}, which has not expired; is it the right"
                    " storage, and is its file system mounted? Mail waits for it"
                )
            why = "is not there" if ends is None else "has expired"
            raise BodyMissing(f"the body {key} {why}")
        work = partial(unpack, key, stored)
        small = len(stored) <= SMALL_BYTES and not stored.startswith(MAGIC)
        try:
            return work() if small else await trio.to_thread.run_sync(work)
        except Unusable as error:
            problem = str(error)
        if not is_ours(key):
            raise BodyMissing(f"the body {key} {problem}")
        where = ""
        with trio.move_on_after(seconds), suppress(StorageError):
            where = await self._backend.set_aside(key)
        if where:
            log.error("%s: the body %s %s; the file %s", self.name, key, problem, where)
        raise StorageError(
            f"{self.name}: the body {key} {problem}. Mail waits for it until it expires"
        )

    # What is in memory

    def _keep(self, key: str, body: bytes) -> None:
        if len(body) > CACHE_BYTES // 4:
            return
        before = self._cache.pop(key, None)
        self._cached += len(body) - (len(before[1]) if before is not None else 0)
        self._cache[key] = trio.current_time(), body
        while self._cached > CACHE_BYTES:
            _, (_, oldest) = self._cache.popitem(last=False)
            self._cached -= len(oldest)

    def at_hand(self, key: str) -> bytes | None:
        """The body of a key if it is in memory."""
        found = self._cache.get(key)
        if found is None:
            return None
        since, body = found
        if not is_ours(key) and trio.current_time() - since > CACHE_SECONDS:
            del self._cache[key]
            self._cached -= len(body)
            return None
        self._cache.move_to_end(key)
        self._hits += 1
        return body
