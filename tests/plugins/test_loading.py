"""Opening a directory of plugins: what is loaded, in which order, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mailerq.errors import PluginError
from mailerq.plugins import Plugins
from tests.plugins.kit import Calls, build_text, install, opened

# As printed in the plugin documentation of version 2.1, for C and for C++.
MINIMAL = """
#include <mailerq.h>

/**
 *  Function called by MailerQ to find out if the plugin is compatible
 *  with the MailerQ executable
 *
 *  @return int     API version number for which the plugin is compiled
 */
MQ_EXPORT int mq_version() {
    return MQ_API_VERSION;
}

/**
 *  Function that is called by MailerQ to initialize the plugin. This
 *  function is called right after the plugin is loaded.
 *
 *  This is an optional function, you do not have to implement it. MailerQ
 *  only calls it if it exists.
 */
MQ_EXPORT void mq_initialize() {
    // @todo add your own initialization code
}

/**
 *  Function that is called right before MailerQ stops running.
 *
 *  This is an optional function, you do not have to implement it. MailerQ
 *  only calls it if it exists.
 */
MQ_EXPORT void mq_cleanup() {
    // @todo add your own cleanup code
}
"""

LOUD = """
#include <mailerq.h>
MQ_EXPORT int mq_version() { return 1; }
MQ_EXPORT void mq_initialize() { MQ_Log(MQ_INFO, "initialize"); }
MQ_EXPORT void mq_cleanup() { MQ_Log(MQ_INFO, "cleanup"); }
MQ_EXPORT bool mq_context_initialize(MQ_Context *context)
{ MQ_Log(MQ_INFO, context ? "context" : "nothing"); return false; }
"""


@pytest.mark.parametrize("name", ["minimal.c", "minimal.cpp"])
async def test_minimal_plugin_loads_as_printed(tmp_path: Path, name: str) -> None:
    install(tmp_path, minimal=build_text(MINIMAL, "-fvisibility=hidden", name=name))
    async with opened(tmp_path) as (plugins, context):
        assert plugins.names == ("minimal.so",)
        assert not plugins.listens("connect")
        assert await context.connection(-1).connect() is None


async def test_plugins_are_called_in_byte_order_of_their_names(
    tmp_path: Path, calls: Calls
) -> None:
    plugin = build_text(LOUD)
    install(tmp_path, **dict.fromkeys(["b", "10-z", "9-a", "B", "é"], plugin))
    (tmp_path / "README").write_text("not a plugin")
    async with opened(tmp_path) as (plugins, _):
        assert plugins.names == ("10-z.so", "9-a.so", "B.so", "b.so", "é.so")
        order = ["10-z", "9-a", "B", "b", "é"]
        assert calls.take() == [
            f"{name} {what}" for what in ("initialize", "context") for name in order
        ]
    assert calls.take() == [f"{name} cleanup" for name in order]


def test_missing_directory_is_no_plugins(tmp_path: Path) -> None:
    assert Plugins.load(str(tmp_path / "missing")).names == ()


def test_directory_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError, match="file: the plugins cannot be listed"):
        Plugins.load(str(tmp_path / "file"))


def refusal(directory: Path, text: str) -> str:
    install(directory, bad=build_text(text))
    with pytest.raises(PluginError) as caught:
        Plugins.load(str(directory))
    return str(caught.value)


def test_wrong_version_is_named_with_the_accepted_ones(tmp_path: Path) -> None:
    problem = refusal(tmp_path, "int mq_version(void) { return 7; }")
    assert problem == (
        f"{tmp_path}/bad.so: the plugin was built for version 7 of the plugin interface; "
        "this mailerq accepts versions 1 to 2"
    )


def test_missing_version_is_named(tmp_path: Path) -> None:
    problem = refusal(tmp_path, "int version(void) { return 2; }")
    assert problem == f"{tmp_path}/bad.so: not a plugin: it does not export mq_version()"


def test_unknown_symbol_is_named(tmp_path: Path) -> None:
    problem = refusal(
        tmp_path, "int MQ_NoSuchThing(void); int mq_version(void) { return MQ_NoSuchThing(); }"
    )
    assert problem.startswith(f"{tmp_path}/bad.so: the plugin cannot be opened: ")
    assert "MQ_NoSuchThing" in problem


@pytest.mark.parametrize("content", [b"", b"not an ELF file", b"\x7fELF" + bytes(100)])
def test_file_that_is_no_shared_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.so").write_bytes(content)
    with pytest.raises(PluginError, match=r"bad\.so: the plugin cannot be opened: "):
        Plugins.load(str(tmp_path))


def test_dangling_link_is_named(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "bad.so")
    with pytest.raises(PluginError, match=r"bad\.so: the plugin cannot be opened: "):
        Plugins.load(str(tmp_path))


def test_every_plugin_is_checked_before_any_is_initialized(tmp_path: Path, calls: Calls) -> None:
    install(tmp_path, a=build_text(LOUD), b=build_text("int mq_version(void) { return 0; }"))
    with pytest.raises(PluginError, match=r"b\.so: .*version 0"):
        Plugins.load(str(tmp_path))
    assert calls.take() == []


async def test_context_initialize_that_is_not_handed_back_is_an_error(
    tmp_path: Path, calls: Calls
) -> None:
    text = LOUD.replace("return false", "return true")
    install(tmp_path, stuck=build_text(text))
    plugins = Plugins.load(str(tmp_path), timeout=0.05)
    with pytest.raises(PluginError, match=r"stuck\.so: mq_context_initialize failed: timed out"):
        await plugins.open_context()
    assert calls.take_warnings() == [
        "stuck mq_context_initialize was not handed back within 0.05 seconds; given up"
    ]


async def test_a_hidden_file_is_no_plugin(tmp_path: Path) -> None:
    install(tmp_path, seen=build_text(LOUD))
    (tmp_path / ".seen.so.swp.so").write_text("what an editor left")
    async with opened(tmp_path) as (plugins, _):
        assert plugins.names == ("seen.so",)


def test_after_a_failed_initialize_those_before_are_cleaned_up(
    tmp_path: Path, calls: Calls
) -> None:
    bad = """
        #include <mailerq.h>
        MQ_EXPORT int mq_version() { return MQ_API_VERSION; }
        MQ_EXPORT void mq_initialize() { throw 1; }
        MQ_EXPORT void mq_cleanup() { MQ_Log(MQ_INFO, "cleanup"); }
    """
    loud = build_text(LOUD)
    install(tmp_path, a=loud, b=loud, c=build_text(bad, name="bad.cpp"), d=loud)
    plugins = Plugins.load(str(tmp_path))
    with pytest.raises(PluginError, match=r"c\.so: .* mq_initialize"):
        plugins.initialize()
    assert calls.take() == ["a initialize", "b initialize", "a cleanup", "b cleanup"]
    plugins.cleanup()
    assert calls.take() == []
