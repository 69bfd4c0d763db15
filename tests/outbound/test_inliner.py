"""Style sheets in HTML mail: what is moved, and that hostile HTML harms one mail only."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from mailerq.mail.made import NotMade
from mailerq.outbound import inliner
from mailerq.outbound.inliner import Inliner
from tests.outbound.kit import open_bench
from tests.support import DEADLINE, ROOT

pytest.importorskip("css_inline")

STYLED = (
    "<html><head><style>p{color:red}@media print{p{color:blue}}</style></head>"
    "<body>{}</body></html>"
)

SLOW = "<style>" + "p{a:b}" * 20_000 + "</style>" + "<p>" * 100_000


@pytest.fixture
def moving() -> Iterator[Inliner]:
    moving = Inliner()
    yield moving
    moving.close()


def test_rules_move_into_the_elements_and_those_that_cannot_stay(moving: Inliner) -> None:
    html = moving.inline(
        STYLED.replace("{}", "<p>ü &amp; <b>x</b></p><!--[if mso]><i><![endif]-->")
    )
    assert '<p style="color: red;">ü &amp; <b>x</b></p><!--[if mso]><i><![endif]-->' in html
    assert "@media print" in html
    assert "p{color:red}" not in html


def test_html_without_a_style_sheet_is_not_touched(moving: Inliner) -> None:
    assert moving.inline("<p>x<td>") == "<p>x<td>"


def test_no_file_is_read(moving: Inliner, tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("p{color:green}")
    links = "".join(
        f'<link rel="stylesheet" href="{way}{tmp_path}/x.css">' for way in ("", "file://")
    )
    html = moving.inline(links + f"<style>@import url('{tmp_path}/x.css'); b{{c:d}}</style><p>x")
    assert "green" not in html


@pytest.mark.parametrize("html", ["<div>" * 100_000, "<p>" * 20_000 + "<b>" * 20_000])
def test_html_that_breaks_the_library_costs_only_itself(moving: Inliner, html: str) -> None:
    for _ in range(2):
        with pytest.raises(NotMade, match="property inlinecss: the HTML takes too much") as caught:
            moving.inline("<style>b{c:d}</style>" + html)
        assert caught.value.state == "responsive"
        assert 'style="color: red;"' in moving.inline(STYLED.replace("{}", "<p>x"))


def test_html_that_takes_long_is_given_up(moving: Inliner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inliner, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(NotMade, match="takes too much time"):
        moving.inline(SLOW)


def test_a_process_that_was_killed_costs_no_mail(moving: Inliner) -> None:
    styled = STYLED.replace("{}", "<p>x")
    expected = moving.inline(styled)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        process = moving._process
        assert process is not None
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()
        assert moving.inline(styled) == expected
        assert (moving._process is process) is (number != signal.SIGKILL)


def test_a_library_that_cannot_be_loaded_is_a_fault_of_this_host(
    moving: Inliner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child.py"
    child.write_text("raise SystemExit(7)")
    monkeypatch.setattr(inliner, "CHILD", child)
    with pytest.raises(OSError, match="ended with status 7"):
        moving.inline(STYLED)


def test_no_process_is_left_or_started_after_the_end() -> None:
    moving, ends = Inliner(), Counter[str]()

    def inline() -> None:
        try:
            moving.inline(SLOW)
        except OSError as error:
            ends[str(error)] += 1

    threads = [threading.Thread(target=inline) for _ in range(3)]
    for thread in threads:
        thread.start()
    while moving._process is None:
        assert any(thread.is_alive() for thread in threads)
    began = monotonic()
    moving.close()
    assert monotonic() - began < inliner.TIMEOUT_SECONDS
    for thread in threads:
        thread.join()
    assert ends == {"style sheets are not moved any more: deliveries end": 3}
    assert moving._process is None


def test_a_process_whose_daemon_is_gone_ends_though_the_html_takes_long() -> None:
    name = "mailerq.outbound.inline_child"
    program = f"import {name} as child; child.ALARM_SECONDS = 1; child.main()"
    html = SLOW.encode()
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=len(html).to_bytes(4, "big") + html,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, b"")


def test_without_the_library_the_result_says_what_to_install(
    moving: Inliner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inliner, "find_spec", lambda name: None)
    with pytest.raises(NotMade, match="install mailerq"):
        moving.inline(STYLED)


async def test_a_styled_template_is_delivered_with_its_styles_in_the_elements() -> None:
    body = "Subject: x\r\nContent-Type: text/html\r\n\r\n" + STYLED.replace(
        "{}", "<table>{foreach $x in $l}<tr><td><p>{$x}</p></td></tr>{/foreach}</table>"
    )
    async with open_bench() as bench:
        bench.send(body=body, inlinecss=1, data={"l": ["<1>", "2"]})
        await bench.results("success")
        mail = bench.peer.mails[0].body.decode()
        assert '<tr><td><p style="color: red;">&lt;1&gt;</p></td></tr>' in mail
        assert mail.count('style="color: red;"') == 2


async def test_html_that_crashes_the_library_fails_and_the_next_mail_goes() -> None:
    head = "Subject: x\r\nContent-Type: text/html\r\n\r\n<style>p{a:b}</style>\r\n"
    async with open_bench(domain_maxconnections=1) as bench:
        bench.send(body=head + "<div>" * 100_000, inlinecss=True)
        (result,) = await bench.results("failure")
        assert (result["type"], result["state"]) == ("responsive", "responsive")
        bench.send(body=head + "<p>x", inlinecss=True)
        await bench.results("success")


async def test_a_host_that_can_start_no_process_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory() -> None:
        raise OSError("no memory")

    monkeypatch.setattr(inliner, "_start", no_memory)
    async with open_bench() as bench:
        bench.send(body="Content-Type: text/html\r\n\r\n<style>", inlinecss=True)
        assert (await bench.retried())["code"] == 451
