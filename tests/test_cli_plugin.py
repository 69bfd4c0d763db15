"""``mailerq plugin check``: each mistake that a plugin can have is said in words."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import struct
from pathlib import Path

import pytest

from mailerq.cli.plugin import main
from mailerq.inspection import Report, examine
from mailerq.plugins import Plugins
from tests.plugins.kit import ROOT, SOURCES, build, build_text
from tests.support import mailerq

GOOD = """
#include <mailerq.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
MQ_EXPORT void mq_initialize(void) { }
"""


def plugin(directory: Path, text: str, *options: str, name: str = "plugin.c") -> Path:
    target = directory / "tried.so"
    shutil.copy(build_text(text, *options, name=name), target)
    target.chmod(0o755)
    return target


def check(path: Path, *options: str) -> tuple[int, str]:
    done = mailerq("plugin", "check", str(path), *options)
    assert done.stderr == b"" or b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode()


def texts(report: Report, level: str) -> list[str]:
    return [finding.text for finding in report.findings if finding.level == level]


def warnings(path: Path) -> list[str]:
    report = examine(str(path))
    assert texts(report, "error") == []
    return texts(report, "warning")


def errors(path: Path, seconds: float = 20) -> list[str]:
    report = examine(str(path), seconds=seconds)
    assert report.status == 2
    return texts(report, "error")


def test_a_good_plugin_is_described(tmp_path: Path) -> None:
    path = plugin(tmp_path, GOOD)
    assert check(path) == (
        0,
        f"{path}: good\n  interface version 2\n  exports mq_version, mq_initialize\n",
    )


def test_json_has_the_same(tmp_path: Path) -> None:
    path = plugin(tmp_path, GOOD.replace("MQ_API_VERSION", "1"))
    status, text = check(path, "--json")
    assert (status, json.loads(text)) == (0, [{
        "path": str(path), "version": 1, "functions": ["mq_version", "mq_initialize"],
        "id_size": None, "findings": [], "status": 0,
    }])  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "plugins").glob("*.c*")))
def test_the_example_plugins_are_good(tmp_path: Path, name: str) -> None:
    options = ["-fvisibility=hidden", "-lev", "-ljson-c", "-lcrypt", "-lpthread"]
    shutil.copy(build(ROOT / "plugins" / name, *options), tmp_path / "tried.so")
    expected = ["exports no function that mailerq calls: it does nothing"]
    assert warnings(tmp_path / "tried.so") == (expected if name == "null.c" else [])


def test_the_worst_of_several_is_the_exit_status(tmp_path: Path) -> None:
    good, odd, bad = tmp_path / "a.so", tmp_path / "b.so", tmp_path / "c.so"
    shutil.copy(plugin(tmp_path, GOOD), good)
    shutil.copy(plugin(tmp_path, "int mq_version(void) { return 1; }"), odd)
    bad.write_text("nothing")
    (tmp_path / "tried.so").unlink()
    assert mailerq("plugin", "check", str(good), str(odd)).returncode == 1
    assert mailerq("plugin", "check", str(good), str(bad)).returncode == 2
    done = mailerq("plugin", "check", f"--plugin-directory={tmp_path}", "--json")
    assert done.returncode == 2
    assert [report["status"] for report in json.loads(done.stdout)] == [0, 1, 2]


def test_of_a_directory_the_files_are_checked_that_a_start_would_load(tmp_path: Path) -> None:
    shutil.copy(plugin(tmp_path, GOOD), tmp_path / ".copy.so")
    (tmp_path / ".broken.so").write_text("half of it")
    status, text = check(tmp_path)
    assert status == 0
    assert text.startswith(f"{tmp_path}/tried.so: good\n")
    assert ".so" not in text.removeprefix(f"{tmp_path}/tried.so")


def test_a_name_that_is_misspelt_is_told_from_the_right_one(tmp_path: Path) -> None:
    text = """
    int mq_version(void) { return 2; }
    int mq_smtp_in_rcpto(void) { return 0; }
    int MQ_smtp_in_data(void) { return 0; }
    int mq_own_parser_of_things(void) { return 0; }
    """
    assert warnings(plugin(tmp_path, text)) == [
        "MQ_smtp_in_data: mailerq calls no such function; did you mean mq_smtp_in_data?",
        "mq_own_parser_of_things: mailerq calls no such function",
        "mq_smtp_in_rcpto: mailerq calls no such function; did you mean mq_smtp_in_rcptto?",
        "exports no function that mailerq calls: it does nothing",
    ]


def test_a_file_without_a_version_is_no_plugin(tmp_path: Path) -> None:
    path = plugin(tmp_path, "int mq_versoin(void) { return 2; }")
    report = examine(str(path), opens=False)
    assert texts(report, "error") == ["is no plugin: it does not export mq_version()"]
    assert texts(report, "warning") == [
        "mq_versoin: mailerq calls no such function; did you mean mq_version?"
    ]


def test_cpp_linkage_is_told(tmp_path: Path) -> None:
    text = """
    extern "C" int mq_version() { return 2; }
    void mq_initialize() { }
    namespace mine { void mq_cleanup() { } }
    """
    assert warnings(plugin(tmp_path, text, name="plugin.cpp"))[:2] == [
        'mq_initialize has C++ linkage: declare it extern "C"',
        'mq_cleanup has C++ linkage: declare it extern "C"',
    ]


def test_a_hidden_function_is_told(tmp_path: Path) -> None:
    text = """
    __attribute__((visibility("default"))) int mq_version(void) { return 2; }
    void mq_initialize(void) { }
    """
    assert warnings(plugin(tmp_path, text, "-fvisibility=hidden"))[0] == (
        "mq_initialize is hidden, and so is never called: mark it MQ_EXPORT"
    )


def test_all_symbols_that_nobody_defines_are_named_with_a_hint(
    tmp_path: Path,
) -> None:
    text = """
    int MQ_continue(void), MQ_nothing_like_it(void), nowhere(void), getpid(void), ev_run(void);
    int _ZN4some5whereEv(void);
    int mq_version(void)
    {
        return MQ_continue() + MQ_nothing_like_it() + nowhere() + getpid() + ev_run()
            + _ZN4some5whereEv();
    }
    """
    assert sorted(errors(plugin(tmp_path, text))) == [
        "MQ_continue is defined nowhere; did you mean MQ_Continue?",
        "MQ_nothing_like_it is defined nowhere; this mailerq has no such function",
        "_ZN4some5whereEv is defined nowhere: link all object files, with c++",
        "nowhere is defined nowhere",
    ]


def test_another_machine_is_named_and_nothing_is_opened(tmp_path: Path) -> None:
    path = plugin(tmp_path, GOOD)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\x01" + data[5:18] + struct.pack("<H", 3) + data[20:])
    (text,) = errors(path)
    assert text.startswith("is for another machine: x86 (32 bits), 32 bits, little-endian; ")


def test_a_file_that_is_no_shared_object_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "tried.so"
    path.write_text("#!/bin/sh\n")
    assert errors(path) == ["is no shared object but a script"]
    path.unlink()
    assert errors(path) == ["cannot be opened: No such file or directory"]
    path.mkdir()
    assert errors(path) == ["is no file"]
    path.rmdir()
    os.mkfifo(path)
    assert errors(path) == ["is no file"]
    shutil.copy(build_text(GOOD, "-c"), tmp_path / "object.so")
    assert "an object file, not linked yet" in errors(tmp_path / "object.so")[0]


@pytest.mark.parametrize("version", [0, 3, -1])
def test_a_version_that_is_not_accepted_is_an_error(tmp_path: Path, version: int) -> None:
    (text,) = errors(plugin(tmp_path, f"int mq_version(void) {{ return {version}; }}"))
    assert f"built for version {version} of the plugin interface" in text


@pytest.mark.parametrize(("size", "good"), [(0, False), (1, True), (998, True), (999, False)])
def test_the_size_of_ids_has_bounds(tmp_path: Path, size: int, good: bool) -> None:
    text = f"""
    #include <mailerq.h>
    MQ_EXPORT int mq_version(void) {{ return MQ_API_VERSION; }}
    MQ_EXPORT size_t mq_message_id_size(void) {{ return {size}; }}
    MQ_EXPORT size_t mq_message_id(char *buffer, size_t size) {{ (void)buffer; return size; }}
    """
    report = examine(str(plugin(tmp_path, text)))
    assert report.status == (0 if good else 2)
    assert report.id_size == (size if good else None)


def test_an_id_function_alone_is_a_warning(tmp_path: Path) -> None:
    path = plugin(tmp_path, GOOD + "size_t mq_message_id_size(void) { return 8; }")
    assert "exports mq_message_id_size without mq_message_id; it is ignored" in warnings(path)


def test_a_plugin_that_ends_the_process_is_warned_of(tmp_path: Path) -> None:
    text = "#include <unistd.h>\n" + GOOD.replace("{ }", "{ _exit(1); }")
    assert warnings(plugin(tmp_path, text)) == ["calls _exit(), which ends the whole server"]


def test_a_sanitizer_is_warned_of(tmp_path: Path) -> None:
    report = examine(str(plugin(tmp_path, GOOD, "-fsanitize=address")))
    assert any("built with AddressSanitizer" in text for text in texts(report, "warning"))


def test_a_file_that_others_may_change_is_warned_of(tmp_path: Path) -> None:
    path = plugin(tmp_path, GOOD)
    path.chmod(0o777)
    assert warnings(path) == ["can be changed by everybody: chmod o-w"]
    path.chmod(0o755)
    tmp_path.chmod(0o777)
    assert warnings(path) == [f"its directory {tmp_path} can be changed by everybody: chmod o-w"]
    tmp_path.chmod(0o1777)
    assert warnings(path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else_is_warned_of(tmp_path: Path) -> None:
    path = plugin(tmp_path, GOOD)
    os.chown(path, 12345, 12345)
    path.chmod(0o775)
    assert warnings(path) == [
        "can be changed by group 12345: chmod g-w",
        "belongs to account 12345, not to root or the account of mailerq",
    ]
    assert texts(examine(str(path), owners=[12345]), "warning") == [
        "can be changed by group 12345: chmod g-w"
    ]


FAULT = ["-lev", "-lpthread", "-ldl", "-Wno-infinite-recursion"]


@pytest.mark.parametrize(
    ("where", "what", "text"),
    [
        ("constructor", "SIGSEGV", "ends the process by SIGSEGV when it is opened: "
         "SIGSEGV in dlopen() or a constructor of plugin tried.so"),
        ("mq_version", "SIGABRT", "ends the process by SIGABRT when it is opened: "
         "SIGABRT in mq_version of plugin tried.so"),
        ("mq_message_id_size", "exit", "ends the process with status 7 when it is opened: "
         "exit() was called in mq_message_id_size of plugin tried.so"),
    ],
)  # fmt: skip
def test_what_ends_the_child_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str, text: str
) -> None:
    shutil.copy(build(SOURCES / "fault.c", *FAULT), tmp_path / "tried.so")
    monkeypatch.setenv("FAULT_IN", where)
    monkeypatch.setenv("FAULT", what)
    assert errors(tmp_path / "tried.so") == [text]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("constructor", "deadlock"),
        ("mq_version", "lock"),
        pytest.param("constructor", "lock", marks=pytest.mark.soak),
        pytest.param("mq_version", "deadlock", marks=pytest.mark.soak),
    ],
)
def test_what_hangs_the_child_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    shutil.copy(build(SOURCES / "fault.c", *FAULT), tmp_path / "tried.so")
    monkeypatch.setenv("FAULT_IN", where)
    monkeypatch.setenv("FAULT", what)
    (text,) = errors(tmp_path / "tried.so", 3)
    assert text.startswith("cannot be opened within 3 s: the process has stood still in ")
    assert ("constructor" if where == "constructor" else where) in text


def test_what_a_plugin_writes_to_descriptors_of_others_is_no_report(tmp_path: Path) -> None:
    text = (
        GOOD
        + """
    #include <unistd.h>
    __attribute__((constructor)) static void load(void)
    {
        for (int fd = 3; fd < 40; fd++) if (write(fd, "{\\"version\\": 1}\\n", 15) < 0) continue;
    }
    """
    )
    assert check(plugin(tmp_path, text))[1].splitlines()[1:2] == ["  interface version 2"]


def test_a_directory_that_cannot_be_listed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(directory: str) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", os.fsencode(directory))

    monkeypatch.setattr("mailerq.cli.plugin.plugins_in", refuse)  # root can list any
    assert main([], ["check", str(tmp_path)]) == 2
    assert (
        f"the plugins of {tmp_path} cannot be listed: Permission denied" in capsys.readouterr()[1]
    )


def test_nothing_is_run_when_nothing_is_to_be_opened(tmp_path: Path) -> None:
    text = GOOD.replace("MQ_EXPORT int", "__attribute__((constructor)) void die(void)"
                        " { __builtin_trap(); }\nMQ_EXPORT int")  # fmt: skip
    path = plugin(tmp_path, text)
    assert check(path)[0] == 2
    assert check(path, "--no-open") == (0, f"{path}: good\n  exports mq_version, mq_initialize\n")


def test_a_name_without_a_slash_is_a_file_here(tmp_path: Path) -> None:
    plugin(tmp_path, GOOD)
    done = mailerq("plugin", "check", "tried.so", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_each_plugin_is_announced_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = GOOD + "\nint mq_smtp_in_rcpto(void);\nint mq_smtp_in_rcpto(void) { return 0; }"
    shutil.move(plugin(tmp_path, text), tmp_path / "a.so")
    shutil.move(plugin(tmp_path, "int mq_version(void) { return 1; }"), tmp_path / "b.so")
    with caplog.at_level(logging.INFO, "mailerq"):
        Plugins.load(str(tmp_path))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "plugin a.so: interface version 2; mq_initialize"),
        ("WARNING", "plugin a.so: mq_smtp_in_rcpto: mailerq calls no such function; "
         "did you mean mq_smtp_in_rcptto?"),
        ("INFO", "plugin b.so: interface version 1; no function that is called"),
        ("WARNING", "plugin b.so: exports no function that mailerq calls: it does nothing"),
    ]  # fmt: skip
