"""Message ids: of the built-in generator, and of a plugin."""

from __future__ import annotations

import os
import re
import string
import threading
import time
from pathlib import Path

import pytest

from mailerq import _core
from mailerq.errors import PluginError
from mailerq.ids import machine_number
from mailerq.plugins import Plugins
from tests.plugins.kit import Calls, build_text, install
from tests.support import least_seconds

DIGITS = string.digits + string.ascii_lowercase[:22]

OWNER = """
#include <mailerq.h>
#include <string.h>
MQ_EXPORT int mq_version() { return MQ_API_VERSION; }
#ifdef SIZE
MQ_EXPORT size_t mq_message_id_size() { return SIZE; }
#endif
#ifdef TEXT
MQ_EXPORT size_t mq_message_id(char *buffer, size_t size)
{ memcpy(buffer, TEXT, strlen(TEXT) < size ? strlen(TEXT) : size); return RETURNS; }
#endif
"""


def number(text: str) -> int:
    value = 0
    for digit in text:
        value = value * 32 + DIGITS.index(digit)
    return value


def test_id_holds_time_process_and_machine() -> None:
    before = int(time.time() * 1000)
    identifier = Plugins.load(None, server_id=42).message_id()
    after = int(time.time() * 1000)
    assert re.fullmatch("[0-9a-v]{32}", identifier)
    assert before <= number(identifier[:9]) <= after
    assert number(identifier[20:25]) == os.getpid()
    assert number(identifier[25:]) == 42


def test_ids_are_unique_across_threads_and_sort_by_time() -> None:
    plugins = Plugins.load(None)
    made: list[list[str]] = [[] for _ in range(4)]

    def make(mine: list[str]) -> None:
        mine.extend(plugins.message_id() for _ in range(5000))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({identifier for mine in made for identifier in mine}) == 20_000
    for mine in made:
        assert [identifier[:9] for identifier in mine] == sorted(i[:9] for i in mine)


def test_ids_of_a_forked_process_are_its_own() -> None:
    plugins = Plugins.load(None)
    plugins.message_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, plugins.message_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    identifier = os.read(reader, 100).decode()
    os.close(reader)
    os.close(writer)
    assert number(identifier[20:25]) == child
    assert identifier[9:17] != plugins.message_id()[9:17]


def test_machine_is_the_server_id_or_derived_from_the_host() -> None:
    assert machine_number(7, "mx.test") == 7
    derived = machine_number(None, "mx.test")
    assert derived == machine_number(None, "mx.test") != machine_number(None, "other.test")
    assert derived >> 34 == 1


def test_ids_are_made_in_no_time() -> None:
    # The target is 5 million in a second.
    assert least_seconds(lambda: _core.generate_ids(100_000)) < 0.2


def test_last_plugin_that_exports_both_owns_the_ids(tmp_path: Path) -> None:
    install(
        tmp_path,
        a=build_text(OWNER, "-DSIZE=8", '-DTEXT="a"', "-DRETURNS=1"),
        b=build_text(OWNER, "-DSIZE=998", '-DTEXT="{id}.~!"', "-DRETURNS=7"),
        c=build_text(OWNER, "-DSIZE=8"),
    )
    assert Plugins.load(str(tmp_path)).message_id() == "{id}.~!"


def test_only_the_owner_is_asked_for_its_size(tmp_path: Path) -> None:
    install(
        tmp_path,
        a=build_text(OWNER, "-DSIZE=0", '-DTEXT="a"', "-DRETURNS=1"),
        b=build_text(
            OWNER, "-DSIZE=(abort(),9)", "-include", "stdlib.h", '-DTEXT="b"', "-DRETURNS=1"
        ),
        c=build_text(OWNER, "-DSIZE=8", '-DTEXT="c"', "-DRETURNS=1"),
    )
    assert Plugins.load(str(tmp_path)).message_id() == "c"


def test_a_plugin_that_is_cleaned_up_supplies_no_id(tmp_path: Path) -> None:
    """Its memory may be gone: mq_cleanup is the last call."""
    install(tmp_path, own=build_text(OWNER, "-DSIZE=8", '-DTEXT="own"', "-DRETURNS=3"))
    plugins = Plugins.load(str(tmp_path))
    plugins.initialize()
    assert plugins.message_id() == "own"
    plugins.cleanup()
    assert re.fullmatch("[0-9a-v]{32}", plugins.message_id())


@pytest.mark.parametrize(
    ("text", "returns", "problem"),
    [
        ("abc", "9", "returned more than the size of the buffer"),
        ("abc", "(size_t)-1", "returned more than the size of the buffer"),
        ("abc", "0", "returned 0"),
        ("a\\nb", "3", "wrote bytes that are not printable ASCII"),
        ("a b", "3", "wrote bytes that are not printable ASCII"),
        ("a\\xff", "2", "wrote bytes that are not printable ASCII"),
        ("<a>", "3", 'wrote one of ()<>[]:;@,"\\'),
        ("a@b", "3", 'wrote one of ()<>[]:;@,"\\'),
        ("a\\\\b", "3", 'wrote one of ()<>[]:;@,"\\'),
        (".a", "2", "wrote a dot at an end or beside another dot"),
        ("a.", "2", "wrote a dot at an end or beside another dot"),
        ("a..b", "4", "wrote a dot at an end or beside another dot"),
    ],
)
def test_unusable_id_is_replaced_and_logged(
    tmp_path: Path, calls: Calls, text: str, returns: str, problem: str
) -> None:
    install(tmp_path, bad=build_text(OWNER, "-DSIZE=8", f'-DTEXT="{text}"', f"-DRETURNS={returns}"))
    identifier = Plugins.load(str(tmp_path)).message_id()
    assert re.fullmatch("[0-9a-v]{32}", identifier)
    assert calls.take_warnings() == [f"bad mq_message_id {problem}; the message gets a default id"]


def test_an_id_that_makes_a_line_too_long_is_replaced(tmp_path: Path, calls: Calls) -> None:
    for length in (700, 701):
        text, returns = "x" * length, f"-DRETURNS={length}"
        directory = tmp_path / str(length)
        directory.mkdir()
        install(directory, long=build_text(OWNER, "-DSIZE=998", f'-DTEXT="{text}"', returns))
        assert len(Plugins.load(str(directory)).message_id()) == (700 if length == 700 else 32)
    assert calls.take_warnings() == [
        "long mq_message_id wrote more than 700 bytes; the message gets a default id"
    ]


@pytest.mark.parametrize("size", [0, 999])
def test_impossible_size_is_an_error(tmp_path: Path, size: int) -> None:
    install(tmp_path, bad=build_text(OWNER, f"-DSIZE={size}", '-DTEXT="x"', "-DRETURNS=1"))
    with pytest.raises(PluginError, match=rf"bad\.so: mq_message_id_size\(\) returned {size}; "):
        Plugins.load(str(tmp_path))


def test_half_an_owner_is_ignored_with_a_warning(tmp_path: Path, calls: Calls) -> None:
    install(
        tmp_path,
        a=build_text(OWNER, "-DSIZE=8"),
        b=build_text(OWNER, '-DTEXT="x"', "-DRETURNS=1"),
    )
    assert len(Plugins.load(str(tmp_path)).message_id()) == 32
    assert calls.take_warnings() == [
        "a exports mq_message_id_size without mq_message_id; it is ignored",
        "b exports mq_message_id without mq_message_id_size; it is ignored",
    ]
