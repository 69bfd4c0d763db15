"""Moves style sheets of HTML mail into its elements, in a process of its own.

The library css-inline does the work. It holds Python's lock meanwhile, needs as much stack as the
elements are nested, and can take long where many rules meet many elements. So it runs in a child
process, which may crash or be killed: then this mail fails, and the next one gets a new process.

A process that ends may have been killed for reasons that have nothing to do with the mail. So the
mail gets a second process before it fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from mailerq.mail.made import NotMade

__all__ = ["TIMEOUT_SECONDS", "Inliner"]

TIMEOUT_SECONDS: Final = 5.0
"""A long newsletter takes some milliseconds."""

START_SECONDS: Final = 30.0
"""Time for the process to start, on a host that is busy."""

TRIES: Final = 2
"""Processes that a text may cost."""

CHILD: Final = Path(__file__).with_name("inline_child.py")

_STYLE: Final = re.compile(r"<style[\s>]", re.IGNORECASE).search


class Inliner:
    """The child process, started when first needed. Any thread may call; one text at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def inline(self, html: str) -> str:
        """Return the text with its style sheets in the elements. Blocks.

        Raises `NotMade`, and OSError if the process cannot be started.
        """
        if not _STYLE(html):
            return html
        with self._lock:
            text = self._answer(html.encode(errors="replace")).decode()
        if text.startswith("-"):
            raise NotMade("responsive", f"property inlinecss: {text[1:]}")
        return text[1:]

    def close(self) -> None:
        """End the process, and start none any more."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # a text under way gets no answer
        with self._lock:
            self._end()

    def _answer(self, html: bytes) -> bytes:
        for _ in range(TRIES):
            if self._process is None:
                self._process = _start()
            if self._closed:
                break
            answer, in_time = _ask(self._process, html, TIMEOUT_SECONDS)
            if answer is not None:
                return answer
            self._end()
            if not in_time:
                break
        if self._closed:
            raise OSError("style sheets are not moved any more: deliveries end")
        raise NotMade("responsive", "property inlinecss: the HTML takes too much time or memory")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    """Start the process, and wait until it is ready. Raises OSError."""
    if find_spec("css_inline") is None:
        raise NotMade(
            "responsive",
            "property inlinecss: needs css-inline, which is not installed on this host: install"
            " mailerq[css] or css-inline with pip",
        )
    process = subprocess.Popen(
        [sys.executable, "-P", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    ready, _ = _ask(process, b"", START_SECONDS)
    if ready is None:
        process.kill()
        process.communicate()
        raise OSError(f"the process for css-inline ended with status {process.returncode}")
    return process


def _ask(
    process: subprocess.Popen[bytes], html: bytes, seconds: float
) -> tuple[bytes | None, bool]:
    """Send a request; return the answer, None if there is none, and whether the time sufficed."""
    assert process.stdin is not None and process.stdout is not None
    over = threading.Event()

    def give_up() -> None:
        over.set()
        process.kill()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(len(html).to_bytes(4, "big") + html)
        process.stdin.flush()
        size = process.stdout.read(4)
        answer = process.stdout.read(int.from_bytes(size, "big"))
    except BrokenPipeError:
        return None, not over.is_set()
    finally:
        timer.cancel()
    complete = len(size) == 4 and len(answer) == int.from_bytes(size, "big") > 0
    return (answer if complete else None), not over.is_set()
