"""Validate DNSSEC in this process, with libunbound (Debian: libunbound8 and dns-root-data).

Theory of operation
-------------------
libunbound asks on a thread of its own and writes to a pipe when answers are there. A task waits for
the pipe to be readable and lets `ub_process` call back, so that all Python code runs in the trio
loop. The task ends, and frees the context, when the client is closed and no lookup is under way, or
with the loop. A lookup that is cancelled is cancelled in the library too.

Guarantees
----------
`ub_process`, and so `_called_back`, runs only in the trio loop that the client belongs to. A result
belongs to the callback, which copies what is needed and frees the result.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import trio

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem
from mailerq.net.dns_client import LENIENT, MAX_ANSWER, MAX_TTL, Answer, NoAnswer, answer_in

if TYPE_CHECKING:
    pass

__all__ = ["Unbound", "check", "library", "problems"]

LIBRARY: Final = "libunbound.so.8"

OPTIONS: Final = (
    # The servers in dns-servers may be on this host, and any port.
    (b"do-not-query-localhost:", b"no"),
    (b"edns-buffer-size:", b"1232"),
    # Answers are also kept by the resolver, within these bounds.
    (b"cache-max-ttl:", b"%d" % MAX_TTL),
    (b"cache-max-negative-ttl:", b"%d" % MAX_TTL),
)

MAX_REASON: Final = 200
"""Characters of a reason."""


class _Result(ctypes.Structure):
    """``struct ub_result`` of unbound.h, the same since version 1.9."""

    _fields_ = (
        ("qname", ctypes.c_char_p),
        ("qtype", ctypes.c_int),
        ("qclass", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("len", ctypes.c_void_p),
        ("canonname", ctypes.c_char_p),
        ("rcode", ctypes.c_int),
        ("answer_packet", ctypes.c_void_p),
        ("answer_len", ctypes.c_int),
        ("havedata", ctypes.c_int),
        ("nxdomain", ctypes.c_int),
        ("secure", ctypes.c_int),
        ("bogus", ctypes.c_int),
        ("why_bogus", ctypes.c_char_p),
        ("was_ratelimited", ctypes.c_int),
        ("ttl", ctypes.c_int),
    )


_ResultPointer = ctypes.POINTER(_Result)
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, _ResultPointer)


@cache
def library() -> ctypes.CDLL:
    """The library with the types of its functions. Raises OSError if it is missing."""
    found = ctypes.CDLL(LIBRARY)
    text, number, pointer = ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p
    for name, result, arguments in (
        ("ub_ctx_create", pointer, ()),
        ("ub_ctx_delete", None, (pointer,)),
        ("ub_ctx_set_option", number, (pointer, text, text)),
        ("ub_ctx_set_fwd", number, (pointer, text)),
        ("ub_ctx_add_ta_file", number, (pointer, text)),
        ("ub_ctx_async", number, (pointer, number)),
        ("ub_ctx_debugout", number, (pointer, pointer)),
        ("ub_fd", number, (pointer,)),
        ("ub_process", number, (pointer,)),
        (
            "ub_resolve_async",
            number,
            (pointer, text, number, number, pointer, _Callback, ctypes.POINTER(number)),
        ),
        ("ub_cancel", number, (pointer, number)),
        ("ub_resolve_free", None, (_ResultPointer,)),
        ("ub_strerror", text, (number,)),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def check(config: Config) -> None:
    """Load the library while its files can be read. Raises `ConfigError` as `problems` says."""
    if found := list(problems(config)):
        raise ConfigError.of(found)


def problems(config: Config) -> Iterator[Problem]:
    """Yield why `dns-validator: unbound` cannot work."""
    if config.dns_validator != "unbound":
        return
    try:
        library()
    except (OSError, AttributeError) as error:
        text = f"dns-validator: unbound needs {LIBRARY}, which Debian has in libunbound8: {error}"
        yield Problem(config.origin("dns-validator"), text, "dns-validator")
    path = config.dns_trust_anchor
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        text = (
            f"dns-trust-anchor: cannot read {path}: {error.strerror}; Debian has the keys of the"
            " root zone in dns-root-data"
        )
        yield Problem(config.origin("dns-trust-anchor"), text, "dns-trust-anchor")


@dataclass(slots=True)
class _Lookup:
    """A lookup under way; `result` is an error, or the wire form and whether it is secure."""

    done: trio.Event = field(default_factory=trio.Event)
    result: tuple[bytes, bool] | str = "not answered"


class Unbound:
    """A `DnsClient` that believes nobody: it checks the signatures itself.

    It asks `dns-servers`, or without them the servers of the zones, from the root down.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lifetime = config.dns_timeout * config.dns_attempts
        self._context: int | None = None
        self._lookups: dict[int, _Lookup] = {}
        self._last = 0
        self._life = trio.CancelScope()
        self._closing = False
        self._callback = _Callback(self._called_back)

    def untrusted(self) -> str:
        """See `DnsClient.untrusted`."""
        return ""

    async def ask(self, name: str, kind: str) -> Answer:
        """See `DnsClient.ask`."""
        import dns.exception
        import dns.message
        import dns.rdataclass
        import dns.rdatatype

        if "\0" in name:
            raise NoAnswer(f"{name!r} is no name")  # C would ask for the part before
        result: tuple[bytes, bool] | str = f"no answer in {self._lifetime:g} s"
        with trio.move_on_after(self._lifetime):
            result = await self._resolve(
                name.encode(), dns.rdatatype.from_text(kind), dns.rdataclass.IN
            )
        if isinstance(result, str):
            raise NoAnswer(f"{name}: {result}")
        wire, secure = result
        if len(wire) > MAX_ANSWER:
            raise NoAnswer(f"{name}: the answer has more than {MAX_ANSWER} bytes")
        try:
            message = dns.message.from_wire(wire, continue_on_error=kind in LENIENT)
        except (dns.exception.DNSException, ValueError) as error:
            raise NoAnswer(f"{name}: {error}") from None
        return answer_in(message, name, secure=secure)

    def close(self) -> None:
        """See `DnsClient.close`."""
        self._closing = True
        if not self._lookups:
            self._life.cancel()

    async def _resolve(self, name: bytes, kind: int, klass: int) -> tuple[bytes, bool] | str:
        unbound = library()
        context = self._open()
        self._last += 1
        key, lookup = self._last, _Lookup()
        number = ctypes.c_int()
        self._lookups[key] = lookup
        try:
            error = unbound.ub_resolve_async(
                context, name, kind, klass, key, self._callback, ctypes.byref(number)
            )
            if error:
                lookup.done.set()
                return _text_of(error)
            await lookup.done.wait()
            return lookup.result
        finally:
            del self._lookups[key]
            if not lookup.done.is_set():
                unbound.ub_cancel(context, number)
            if self._closing and not self._lookups:
                self._life.cancel()

    def _called_back(self, key: int, error: int, pointer: Any) -> None:
        """Take a result; runs inside `ub_process`."""
        lookup = self._lookups.get(key)
        if error:
            if lookup is not None:
                lookup.result = _text_of(error)
                lookup.done.set()
            return
        if lookup is not None:
            result = pointer.contents
            if result.bogus:
                why = (result.why_bogus or b"bogus").decode(errors="replace")
                lookup.result = f"DNSSEC proves that the answer is wrong: {why[:MAX_REASON]}"
            else:
                wire = ctypes.string_at(result.answer_packet, result.answer_len)
                lookup.result = wire, bool(result.secure)
            lookup.done.set()
        library().ub_resolve_free(pointer)

    def _open(self) -> int:
        """The context. Raises `NoAnswer`."""
        if self._context is not None:
            return self._context
        unbound, config = library(), self._config
        context = unbound.ub_ctx_create()
        if not context:
            raise NoAnswer("libunbound cannot start")
        error = unbound.ub_ctx_async(context, True)
        error = error or unbound.ub_ctx_debugout(context, None)  # not to stderr; results say enough
        for key, value in OPTIONS:
            error = error or unbound.ub_ctx_set_option(context, key, value)
        error = error or unbound.ub_ctx_add_ta_file(context, config.dns_trust_anchor.encode())
        for server in config.dns_servers:
            address = f"{server.address}@{server.port}".encode()
            error = error or unbound.ub_ctx_set_fwd(context, address)
        if error:
            unbound.ub_ctx_delete(context)
            raise NoAnswer(f"libunbound: {_text_of(error)}")
        self._context = context
        trio.lowlevel.spawn_system_task(self._pump, context)
        return int(context)

    async def _pump(self, context: int) -> None:
        """Take results in as they come, until the client is closed."""
        unbound = library()
        try:
            with self._life:
                while True:
                    await trio.lowlevel.wait_readable(unbound.ub_fd(context))
                    if error := unbound.ub_process(context):
                        self._fail(_text_of(error))
        finally:
            self._context = None
            self._fail("the client was closed")
            unbound.ub_ctx_delete(context)

    def _fail(self, reason: str) -> None:
        for lookup in self._lookups.values():
            lookup.result = reason
            lookup.done.set()


def _text_of(error: int) -> str:
    text: bytes = library().ub_strerror(error)
    return text.decode(errors="replace")
