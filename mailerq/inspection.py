"""Find mistakes in a plugin: read its file, then load it in a child process.

Most mistakes show in the file: a function that is misspelt, hidden or has C++ linkage would never
be called, without any message. Other mistakes show when the file is loaded, which runs its code.
`examine` does that in a child process with a deadline. A crash or hang ends only the child, and the
report of the core (`mailerq.faults`) becomes a finding.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from mailerq import _core, elf, faults
from mailerq.errors import PluginError

__all__ = ["Finding", "Report", "announce", "examine", "plugins_in"]

log = logging.getLogger("mailerq")

SECONDS: Final = 10.0
"""Deadline for loading a plugin, because loading delays each start."""

MAX_REPORT_BYTES: Final = 1 << 20
"""Limit for the output of the child."""

_REPORT: Final = re.compile(rb"^report (.*)\n", re.MULTILINE)
"""The line with the report; lines of the core or of the plugin start differently."""

CLOSE: Final = 0.7
"""Similarity, of at most 1, at which a name counts as a misspelling of another."""

_MANGLED: Final = re.compile(r"_Z(?:N\w*?)?(\d+)(mq_\w+)")

_SANITIZERS: Final = {
    "__asan_": "AddressSanitizer",
    "__tsan_": "ThreadSanitizer",
    "__msan_": "MemorySanitizer",
    "__ubsan_": "UndefinedBehaviorSanitizer",
}

_ENDS: Final = ("exit", "_exit", "_Exit", "quick_exit")


@dataclass(frozen=True, slots=True)
class Finding:
    """An error keeps mailerq from starting; a warning does not."""

    level: Literal["error", "warning"]
    text: str


@dataclass(slots=True)
class Report:
    """The facts about a plugin. `version` and `id_size` are None if it was not loaded."""

    path: str
    version: int | None = None
    functions: tuple[str, ...] = ()
    id_size: int | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0: no findings; 1: warnings only; 2: errors."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 1 if levels else 0


def plugins_in(directory: str) -> list[str]:
    """List the plugins of a directory: every ``*.so``, in byte order of the names.

    Names that start with a dot are skipped: editors and unfinished copies leave them. Raises
    OSError.
    """
    names = sorted(os.listdir(os.fsencode(directory)))
    return [
        os.path.join(directory, os.fsdecode(name))
        for name in names
        if name.endswith(b".so") and not name.startswith(b".")
    ]


def examine(
    path: str, *, seconds: float = SECONDS, opens: bool = True, owners: Collection[int] = ()
) -> Report:
    """Examine a file; if it has no errors and `opens` is true, load it in a child process.

    The file may belong to root, to the account of this process, or to one of `owners`.
    """
    report = Report(path)
    image = _look(report, owners)
    if image is not None and opens and report.status < 2:
        _try(report, seconds)
    return report


def announce(library: _core.Library) -> None:
    """Log the version, functions and warnings of each loaded plugin."""
    for path, name in zip(library.paths, library.names, strict=True):
        version, functions = library.exports[name]
        used = ", ".join(functions[1:]) or "no function that is called"
        log.info("plugin %s: interface version %d; %s", name, version, used)
        report = Report(path)
        _look(report, ())
        for finding in report.findings:
            log.warning("plugin %s: %s", name, finding.text)


# The file


def _look(report: Report, owners: Collection[int]) -> elf.Image | None:
    def error(text: str) -> None:
        report.findings.append(Finding("error", text))

    try:
        # O_NONBLOCK: opening a pipe or a device must not block.
        file = os.open(report.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        error(f"cannot be opened: {problem.strerror}")
        return None
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            error("is no file")
            return None

        def source(offset: int, size: int) -> bytes:
            return os.pread(file, size, offset) if offset < facts.st_size else b""

        ours = _own_header()
        header = elf.read_header(source)
        if header.target != ours.target:
            error(f"is for another machine: {header}; this mailerq is for {ours}")
            return None
        if header.kind != elf.SHARED:
            what = elf.KINDS.get(header.kind, "something else")
            error(f"is no shared object but {what}: link it with cc -shared")
            return None
        image = elf.read(source)
    except elf.NotElf as problem:
        error(f"is {problem}" if str(problem).startswith("no ") else str(problem))
        return None
    except OSError as problem:
        error(f"cannot be read: {problem.strerror}")
        return None
    finally:
        os.close(file)
    if image.program:
        error("is no shared object but a program: link it with cc -shared")
        return None
    report.findings += _findings(image)
    report.findings += (Finding("warning", text) for text in _access(report.path, facts, owners))
    exported = {symbol.name for symbol in image.symbols if symbol.defined and not symbol.local}
    report.functions = tuple(name for name in _core.CALLBACKS if name in exported)
    if "mq_version" not in exported:
        error("is no plugin: it does not export mq_version()")
    elif not set(report.functions) - {"mq_version"}:
        report.findings.append(
            Finding("warning", "exports no function that mailerq calls: it does nothing")
        )
    return image


def _own_header() -> elf.Header:
    with open(_core.__file__, "rb") as file:
        return elf.read_header(lambda offset, size: file.read(size))


def _api_functions() -> list[str]:
    """List the functions that plugins may call."""
    with open(_core.__file__, "rb") as file:
        image = elf.read(lambda offset, size: os.pread(file.fileno(), size, offset))
    return [each.name for each in image.symbols if each.defined and each.name.startswith("MQ_")]


def _findings(image: elf.Image) -> Iterator[Finding]:
    known = set(_core.CALLBACKS)
    exported = {symbol.name: symbol for symbol in image.symbols if symbol.defined}
    for name, symbol in sorted(exported.items()):
        if symbol.local:
            continue
        if name in known and symbol.kind != elf.FUNCTION:
            yield Finding("error", f"{name} is no function")
        elif mangled := _mangled(name):
            yield Finding("warning", f'{mangled} has C++ linkage: declare it extern "C"')
        elif name not in known and (name.startswith("mq_") or name.lower() in known):
            yield Finding("warning", f"{name}: mailerq calls no such function{_meant(name, known)}")
    for name in sorted({symbol.name for symbol in image.private} & known - set(exported)):
        yield Finding("warning", f"{name} is hidden, and so is never called: mark it MQ_EXPORT")
    asked = [symbol.name for symbol in image.symbols if not symbol.defined]
    for prefix, sanitizer in _SANITIZERS.items():
        if any(name.startswith(prefix) for name in asked):
            yield Finding(
                "warning",
                f"is built with {sanitizer}: it is slow, and needs its library preloaded",
            )
    for name in asked:
        if name in _ENDS:
            yield Finding("warning", f"calls {name}(), which ends the whole server")


def _mangled(name: str) -> str | None:
    match = _MANGLED.match(name)
    return match[2][: int(match[1])] if match else None


def _meant(name: str, known: Collection[str]) -> str:
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower()[:100], lower, n=1, cutoff=CLOSE)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _access(path: str, facts: os.stat_result, owners: Collection[int]) -> Iterator[str]:
    """Yield warnings about accounts that can change the plugin, and so control the server."""
    trusted = {0, os.geteuid(), *owners}
    folder = os.path.dirname(os.path.realpath(path))
    for what, entry in (("", facts), (f"its directory {folder} ", os.stat(folder))):
        # In a sticky directory such as /tmp, accounts cannot replace files of others.
        mode = 0 if what and entry.st_mode & stat.S_ISVTX else entry.st_mode
        if mode & stat.S_IWOTH:
            yield f"{what}can be changed by everybody: chmod o-w"
        elif mode & stat.S_IWGRP and entry.st_gid not in (0, os.getegid()):
            yield f"{what}can be changed by group {entry.st_gid}: chmod g-w"
        if entry.st_uid not in trusted:
            yield f"{what}belongs to account {entry.st_uid}, not to root or the account of mailerq"


# Loading


def _try(report: Report, seconds: float) -> None:
    path = os.path.abspath(report.path)  # the loader searches its own path for a bare name
    said, status = _run(path, seconds)
    if (match := _REPORT.search(said)) is None:
        lines = said.decode("utf-8", "replace").splitlines()
        report.findings.append(Finding("error", _failure(lines, status, seconds)))
        return
    told = json.loads(match[1])
    report.findings += (Finding("warning", text) for text in told["warnings"])
    if "problem" not in told:
        report.version, report.id_size = told["version"], told["id_size"]
        report.functions = tuple(told["functions"])
    elif told["unresolved"]:
        offered = _api_functions()
        for name in told["unresolved"]:
            hint = f"{name} is defined nowhere{_hint(name, offered)}"
            report.findings.append(Finding("error", hint))
    else:
        report.findings.append(Finding("error", told["problem"].removeprefix(f"{path}: ")))


def _hint(name: str, offered: Collection[str]) -> str:
    if name.startswith("MQ_"):
        return _meant(name, offered) or "; this mailerq has no such function"
    return ": link all object files, with c++" if name.startswith("_Z") else ""


def _failure(lines: list[str], status: int | None, seconds: float) -> str:
    """Explain a missing report by the last line of the core or by the exit status."""
    said = [line.split("] ", 2)[2] for line in lines if line.count("] ") >= 2]
    about = f": {said[-1]}" if said else ""
    if status is None:
        return f"cannot be opened within {seconds:g} s{about}"
    if status < 0:
        with suppress(ValueError):
            how = f"ends the process by {signal.Signals(-status).name} when it is opened"
            return how + about
    return f"ends the process with status {status} when it is opened{about}"


def _run(path: str, seconds: float) -> tuple[bytes, int | None]:
    """Load the file in a child. Return its output and its exit status, None after a timeout."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as output:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "mailerq.inspection", str(writing), path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[writing],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        end = time.monotonic() + seconds
        said = b""
        try:
            while len(said) < MAX_REPORT_BYTES and not _REPORT.search(said):
                left = end - time.monotonic()
                if left <= 0 or not select.select([output], [], [], left)[0]:
                    return said, None
                if not (data := output.read(1 << 16)):
                    break
                said += data
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(end - time.monotonic(), 1.0))
            return said, child.returncode
        finally:
            # The whole process group: the plugin may have started processes.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class _Lines(logging.Handler):
    """A handler that collects log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().partition("] ")[2])


def _trial(writing: int, path: str) -> int:
    """Run as the child: load one plugin, and write the outcome as a line with JSON."""
    faults.report_to([(writing, b"")])
    watch = faults.Watch()
    watch.start(SECONDS / 10)
    lines = _Lines()
    logging.getLogger("mailerq.plugins").addHandler(lines)
    told: dict[str, Any] = {"warnings": lines.lines}
    try:
        library = _core.Library([path])
    except PluginError as error:
        with open(path, "rb") as file:
            image = elf.read(lambda offset, size: os.pread(file.fileno(), size, offset))
        asked = [each.name for each in image.symbols if not each.defined and not each.weak]
        told |= {"problem": str(error), "unresolved": []}
        if "undefined symbol" in str(error):
            told["unresolved"] = _core.unresolved(path, asked)
    else:
        ((version, functions),) = library.exports.values()
        told |= {"version": version, "functions": functions, "id_size": library.id_size}
    watch.stop()
    os.write(writing, f"\nreport {json.dumps(told)}\n".encode())
    os._exit(0)  # do not run the exit code of the plugin


if __name__ == "__main__":
    sys.exit(_trial(int(sys.argv[1]), sys.argv[2]))
