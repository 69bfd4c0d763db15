"""Log files: one line for each event, whatever is in it, and logrotate."""

from __future__ import annotations

from pathlib import Path

from mailerq.net.logs import LogFile


def test_a_line_has_its_date(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), clock=lambda: 0.0)
    log.write("hello")
    log.close()
    assert (tmp_path / "log").read_text() == "[1970-01-01 00:00:00] hello\n"


def test_what_could_forge_a_line_is_escaped(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), clock=lambda: 0.0)
    log.write("a\r\n[2026-01-01 00:00:00] forged\x1b[2J")
    log.close()
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert "\\x0d\\x0a[2026" in text
    assert "\x1b" not in text


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "log"
    log = LogFile(str(path), clock=lambda: now)
    log.write("one")
    path.rename(tmp_path / "log.1")
    now = 10.0
    log.write("two")
    log.close()
    assert "one" in (tmp_path / "log.1").read_text()
    assert "two" in path.read_text()


def test_a_log_that_cannot_be_written_counts_and_goes_on(tmp_path: Path) -> None:
    log = LogFile("/dev/full")
    log.write("lost")
    assert log.lost_lines == 1
    log.close()
