"""Read, check and extend the chain of ARC sets in a header (RFC 8617).

Theory of operation
-------------------
A host that passes mail on adds a set of three fields, with one number: what it found
(ARC-Authentication-Results), a signature over the mail as it leaves (ARC-Message-Signature), and a
seal over all sets so far (ARC-Seal).

`read_chain` finds the sets and judges their form. `checks` names the signatures that must hold: the
message signature of the last set, whose body hash is compared here, and all seals. The caller
looks up the keys. `results_field`, `message_field` and `seal_field` make the next set.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from mailerq.address import parse_domain
from mailerq.errors import AddressError
from mailerq.mail.dkim import HeaderFields, Terms, canonical, signed_data, unsigned_field
from mailerq.mail.dkim_record import RecordProblem, read_tags

__all__ = [
    "MAX_SETS",
    "Chain",
    "Check",
    "Verdict",
    "body_form",
    "checks",
    "message_field",
    "read_chain",
    "results_field",
    "seal_data",
    "seal_field",
]

Verdict = Literal["none", "pass", "fail"]

RESULTS: Final = b"arc-authentication-results"
MESSAGE: Final = b"arc-message-signature"
SEAL: Final = b"arc-seal"

MAX_SETS: Final = 50
"""Sets of a mail (section 4.2.1)."""

MAX_NAMES: Final = 1000
"""Names in ``h=`` that are looked at."""

ALGORITHMS: Final = frozenset(("rsa-sha256", "ed25519-sha256"))

_NUMBER: Final = re.compile(
    rb"[ \t\r\n]*i[ \t\r\n]*=[ \t\r\n]*([0-9]{1,3})[ \t\r\n]*(?:;|\Z)"
).match
_BLANKS: Final = re.compile(rb"[ \t\r\n]+").sub
# The value of b=, up to the next tag.
_SIGNATURE: Final = re.compile(rb"(?<=;)([ \t\r\n]*b[ \t\r\n]*=)[^;]*+").sub


class Set(msgspec.Struct, frozen=True):
    """The three fields of a host, each with its line end, and the tags of two of them."""

    results: bytes
    message: bytes
    seal: bytes
    message_tags: dict[str, bytes]
    seal_tags: dict[str, bytes]


class Chain(msgspec.Struct, frozen=True):
    """The sets of a mail, the first one first; and why they are no chain, if they are none."""

    sets: tuple[Set, ...] = ()
    problem: str = ""
    ended: bool = False
    """The last host has found the chain broken: nobody seals it any more (section 5.1)."""


class Check(msgspec.Struct, frozen=True):
    """A signature, the text that it signs, and its key."""

    domain: str
    selector: str
    algorithm: str
    signature: bytes
    data: bytes

    @property
    def name(self) -> str:
        """The name of the key's DNS record."""
        return f"{self.selector}._domainkey.{self.domain}"


def read_chain(fields: HeaderFields) -> Chain:
    """Find the sets of a mail, and judge their form (section 5.2, steps 1 to 3)."""
    found: dict[bytes, dict[int, bytes]] = {}
    for name in (RESULTS, MESSAGE, SEAL):
        found[name] = numbered = {}
        if fields.count(name) > MAX_SETS:
            return Chain(problem=f"there are more than {MAX_SETS} sets")
        for field in fields.whole(name):
            match = _NUMBER(field.partition(b":")[2]) if name == RESULTS else None
            number = int(match[1]) if match is not None else _number(field)
            if not 0 < number <= MAX_SETS or number in numbered:
                return Chain(problem="a field has no number, or that of another")
            numbered[number] = field
    count = max(map(len, found.values()))
    if any(set(numbered) != set(range(1, count + 1)) for numbered in found.values()):
        return Chain(problem="a set is not whole")
    sets = []
    try:
        for number in range(1, count + 1):
            message, seal = found[MESSAGE][number], found[SEAL][number]
            tags = _tags(message), _tags(seal)
            sets.append(Set(found[RESULTS][number], message, seal, *tags))
    except RecordProblem as error:
        return Chain(problem=str(error))
    if count and sets[-1].seal_tags.get("cv", b"").lower() == b"fail":
        return Chain(tuple(sets), "the last host has found it broken", ended=True)
    for number, each in enumerate(sets, start=1):
        expected = b"none" if number == 1 else b"pass"
        if each.seal_tags.get("cv", b"").lower() != expected or "h" in each.seal_tags:
            return Chain(tuple(sets), f"the seal {number} has the wrong cv=, or an h=")
    return Chain(tuple(sets))


def _tags(field: bytes) -> dict[str, bytes]:
    return read_tags(field.partition(b":")[2])


def _number(field: bytes) -> int:
    try:
        text = _tags(field).get("i", b"")
    except RecordProblem:
        return 0
    return int(text) if text.isdigit() and len(text) < 4 else 0


def body_form(chain: Chain) -> bool | None:
    """Whether the last message signature has the relaxed form of the body; None: it has no form."""
    form = chain.sets[-1].message_tags.get("c", b"simple/simple").lower()
    header, _, body = form.partition(b"/")
    if header not in (b"relaxed", b"simple") or body not in (b"relaxed", b"simple", b""):
        return None
    return body == b"relaxed"


def checks(fields: HeaderFields, chain: Chain, body_hash: bytes) -> list[Check] | None:
    """The signatures that a chain stands on; None if a signature cannot hold.

    `body_hash` is that of the body in the form of `body_form`.
    """
    last = chain.sets[-1]
    tags = last.message_tags
    names = _BLANKS(b"", tags.get("h", b"")).lower().split(b":")
    if "l" in tags or b"from" not in names or SEAL in names or len(names) > MAX_NAMES:
        return None
    if _decoded(tags, "bh") != body_hash:
        return None
    counted: dict[bytes, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    relaxed = tags.get("c", b"simple").lower().startswith(b"relaxed")
    found = [_check(tags, _message_data(fields, names, last.message, relaxed=relaxed))]
    for number in range(len(chain.sets), 0, -1):
        seal = chain.sets[number - 1]
        data = seal_data(chain.sets[: number - 1], seal.results, seal.message, _emptied(seal.seal))
        found.append(_check(seal.seal_tags, data))
    whole = [check for check in found if check is not None]
    return whole if len(whole) == len(found) else None


def _message_data(
    fields: HeaderFields, names: Sequence[bytes], field: bytes, *, relaxed: bool
) -> bytes:
    """The text that a message signature signs, in the order of its ``h=``."""
    taken: dict[bytes, int] = {}
    pieces: list[bytes] = []
    for name in names:
        forms = fields.forms(name, relaxed=relaxed)
        at = taken.get(name, 0)
        if at < len(forms):
            pieces.append(forms[at])
        taken[name] = at + 1
    pieces.append(canonical(_emptied(field), relaxed=relaxed))
    return b"".join(pieces)


def _emptied(field: bytes) -> bytes:
    """A field with an empty ``b=``."""
    name, colon, value = field.partition(b":")
    return name + colon + _SIGNATURE(rb"\1", b";" + value)[1:]


def _decoded(tags: dict[str, bytes], name: str) -> bytes | None:
    try:
        return binascii.a2b_base64(_BLANKS(b"", tags.get(name, b"")), strict_mode=True)
    except ValueError:
        return None


def _check(tags: dict[str, bytes], data: bytes) -> Check | None:
    signature = _decoded(tags, "b")
    algorithm = tags.get("a", b"").decode("ascii", "replace").lower()
    selector = tags.get("s", b"").decode("ascii", "replace")
    try:
        domain = parse_domain(tags.get("d", b"").decode("ascii", "replace"))
    except AddressError:
        return None
    if not signature or algorithm not in ALGORITHMS or not selector or len(selector) > 200:
        return None
    return Check(domain, selector, algorithm, signature, data)


# The next set


def results_field(number: int, hostname: str, verdict: Verdict) -> bytes:
    """Return the field of what this host has found, with its line end."""
    text = f"ARC-Authentication-Results: i={number}; {hostname};\r\n\tarc={verdict}\r\n"
    return text.encode("ascii")


def message_field(
    number: int, terms: Terms, fields: HeaderFields, hash: bytes, now: float
) -> tuple[bytes, bytes]:
    """Return the field of the message signature without its signature, and what it signs.

    `fields` are those of the mail as it leaves; `hash` is that of its body.
    """
    names = list(fields.names(terms.extra))
    if count := fields.count(b"dkim-signature"):
        names.append((b"dkim-signature", min(count, 100)))
    begin = f"ARC-Message-Signature: i={number};"
    field = unsigned_field(terms, names, hash, now, begin=begin)
    return field, signed_data(fields, names, field, relaxed=terms.relaxed_header)


def seal_field(number: int, terms: Terms, verdict: Verdict, now: float) -> bytes:
    """Return the field of a seal without its signature, and without its line end."""
    text = (
        f"ARC-Seal: i={number}; a={terms.algorithm}; t={int(now)}; cv={verdict};\r\n"
        f"\td={terms.domain}; s={terms.selector};\r\n\tb="
    )
    return text.encode("ascii")


def seal_data(sets: Sequence[Set], results: bytes, message: bytes, seal: bytes) -> bytes:
    """Return the text that a seal signs: the earlier sets, and its own with an empty ``b=``."""
    fields = [field for each in sets for field in (each.results, each.message, each.seal)]
    pieces = [canonical(field, relaxed=True) for field in (*fields, results, message, seal)]
    return b"\r\n".join(pieces)
