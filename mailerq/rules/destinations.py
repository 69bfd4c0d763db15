"""Where a message waits: the key of its destination, and its lane there.

Mail is sorted on publication, by its properties alone, so that neither changed settings nor DNS
answers move a row. A key stands for mail with the same possible routes: the domain of the recipient
or the message's own smarthost and user name, the local addresses or the pool that the message
names, the address that it must come back from, and what it demands of TLS. The settings are applied
at each attempt.

Demands count because a pause after a failure holds for a whole destination: mail that cannot go for
want of REQUIRETLS must not keep other mail for the same domain waiting.

Mail that waits for the end of a pause, as its property ``paused`` says, has destinations of its
own, so that nothing reads it meanwhile.

A lane is a number that orders the mail of one destination: lanes of a higher priority come first,
then senders take turns, with separate lanes for new mail and retries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple
from zlib import crc32

__all__ = [
    "MAX_KEY",
    "RETRY_LANE",
    "SENDER_LANES",
    "Place",
    "domain_of",
    "level_of",
    "parked_by",
    "place_of",
    "priority_of",
]

MAX_KEY: Final = 255
"""Characters of a key; a longer key ends in a digest of the whole."""

SENDER_LANES: Final = 128
"""Lanes per priority, shared by all senders. Two senders in one lane wait for each other."""

RETRY_LANE: Final = SENDER_LANES
"""The bit of a lane that marks retries."""

_LEVEL: Final = 2 * SENDER_LANES
_MAX_PRIORITY: Final = 255
_MARK: Final = " paused "
_MAX_ROW: Final = 10**12
_STRICT: Final = frozenset(("required", "verified"))
_EXTENSION: Final = re.compile(r"[-+=][^@]*")


class Place(NamedTuple):
    """The place of a message in a queue that is sorted by destination."""

    destination: str
    lane: int


def place_of(properties: Mapping[str, Any]) -> Place:
    """The place of a message in the outbox. Invalid properties have a place too.

    >>> place_of({"recipient": "ann@Example.com"}).destination
    'example.com'
    >>> place_of({"recipient": "a@b.test", "smarthost": {"hostname": "relay.test"}}).destination
    'via relay.test:25'
    >>> place_of({"recipient": "a@b.test", "ips": ["192.0.2.1"]}).destination
    'b.test from 192.0.2.1'
    >>> place_of({"recipient": "a@b.test", "paused": 17}).destination
    'b.test paused 17'
    >>> place_of({"recipient": "a@b.test", "pool": "bulk"}).destination
    'b.test from pool bulk'
    >>> place_of({"recipient": "a@b.test", "security": "verified"}).destination
    'b.test by verified TLS'
    """
    smarthost = properties.get("smarthost")
    if isinstance(smarthost, dict):
        host = smarthost.get("hostname") or smarthost.get("name")
        key = f"via {host}:{smarthost.get('port') or 25}".lower()
        if smarthost.get("username"):
            key += f" as {smarthost['username']}"
    else:
        recipient = properties.get("recipient")
        key = recipient.rpartition("@")[2].lower() if isinstance(recipient, str) else ""
    ips = properties.get("ips")
    if isinstance(ips, list) and ips:
        key += " from " + ",".join(sorted({str(ip) for ip in ips}))
    elif pool := properties.get("pool"):
        key += f" from pool {pool}"
    if isinstance(pinned := properties.get("forcedip"), str):
        key += f" at {pinned}"
    if isinstance(refused := properties.get("refusedips"), list):
        key += " not from " + ",".join(sorted(map(str, refused)))
    key += _demanded(properties, smarthost)
    paused = properties.get("paused")
    mark = f"{_MARK}{paused}" if type(paused) is int and 0 < paused < _MAX_ROW else ""
    if len(key) + len(mark) > MAX_KEY or not key.isprintable():
        digest = blake2b(key.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        key = ascii(key)[1:201] + " " + digest
    return Place(key + mark, _lane(properties))


def _demanded(properties: Mapping[str, Any], smarthost: object) -> str:
    """What a message demands of TLS, beyond other mail for its hosts, or waives."""
    text = ""
    for level in (properties.get("security"), _secure(smarthost)):
        if isinstance(level, str) and level in _STRICT:
            text += f" by {level} TLS"
    if properties.get("requiretls") is True and properties.get("envelope") != "":
        text += " by REQUIRETLS"
    elif properties.get("tlsrequired") is False:
        text += " without policies"
    return text


def _secure(smarthost: object) -> object:
    return smarthost.get("secure") if isinstance(smarthost, dict) else None


def parked_by(key: str) -> int:
    """The number of the pause that the mail of a destination waits for, or 0.

    >>> parked_by("b.test paused 17"), parked_by("b.test")
    (17, 0)
    """
    number = key.rpartition(_MARK)[2] if _MARK in key else ""
    return int(number) if number.isascii() and number.isdecimal() else 0


def domain_of(key: str) -> str:
    """The domain of a destination whose mail goes to the hosts of a domain, else an empty string.

    >>> domain_of("b.test from 192.0.2.1"), domain_of("via relay.test:25")
    ('b.test', '')
    """
    return "" if key.startswith("via ") else key.partition(" ")[0]


def priority_of(properties: Mapping[str, Any]) -> int:
    """The priority of a message, 0 to 255; higher goes sooner.

    >>> priority_of({}), priority_of({"priority": 7}), priority_of({"priority": 1000})
    (0, 7, 255)
    """
    priority = properties.get("priority")
    return min(max(priority, 0), _MAX_PRIORITY) if isinstance(priority, int) else 0


def _lane(properties: Mapping[str, Any]) -> int:
    level = priority_of(properties)
    tags = properties.get("tags")
    sender = tags[0] if isinstance(tags, list) and tags else properties.get("envelope")
    if not isinstance(sender, str):
        sender = ""
    # VERP and subaddresses give one sender many addresses.
    number = crc32(_EXTENSION.sub("", sender, count=1).lower().encode(errors="surrogatepass"))
    lane = (_MAX_PRIORITY - level) * _LEVEL + number % SENDER_LANES
    return lane + RETRY_LANE if properties.get("results") else lane


def level_of(lane: int) -> int:
    """The priority of a lane as a number; lower comes sooner."""
    return lane // _LEVEL
