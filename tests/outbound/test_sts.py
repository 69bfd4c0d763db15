"""MTA-STS policies from real servers: no trouble and no trick makes a policy weaker."""

from __future__ import annotations

import datetime
import gzip
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from mailerq.outbound.sts import FAILED_SECONDS, MAX_TTL
from mailerq.rules.security import PolicyUnknown, Reason, StsMode, StsPolicy
from mailerq.rules.sts import MAX_PATTERNS
from mailerq.store.sts_file import StsFile
from tests.engine.lag_kit import Meter, meter, no_turn_above
from tests.net.https_server import Stream, response
from tests.outbound.sts_kit import DAY, DOMAIN, HOST, StsBench, open_sts_bench, policy_text

SERVFAIL = 2
RECORD = ("_mta-sts.d.example", "TXT")
POLICY = StsPolicy(DOMAIN, "1", StsMode.ENFORCE, ("mx.d.example",))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[StsBench]:
    async with open_sts_bench(tmp_path) as opened:
        yield opened


def later(bench: StsBench, seconds: float = MAX_TTL + 1) -> None:
    """Let the answers of the name servers become old."""
    bench.clock.now += seconds


# The record


async def test_a_policy_is_fetched_by_the_name_of_its_host(bench: StsBench) -> None:
    assert await bench.policies.find(DOMAIN) == POLICY
    (request,) = bench.web.requests
    assert request.target == "/.well-known/mta-sts.txt"
    assert request.headers["host"].startswith(HOST) and bench.web.names == [HOST]


async def test_aliases_of_the_record_are_followed_and_no_parent_domain_is_asked(
    bench: StsBench,
) -> None:
    bench.dns.zone["_mta-sts.d.example", "CNAME"] = ["_mta-sts.host.example."]
    bench.dns.zone["_mta-sts.host.example", "TXT"] = bench.dns.zone.pop(RECORD)
    assert await bench.policies.find(DOMAIN) == POLICY
    assert await bench.policies.find("sub.d.example") is None
    assert set(bench.dns.questions) >= {("_mta-sts.sub.d.example", "TXT")}


@pytest.mark.parametrize(
    "records",
    [
        ['"v=STSv1; id=1"', '"v=STSv1; id=1;"'],
        ['"v=STSv1; id=1"', '"v=STSv1; id=2"'],
        ['"v=STSv1; id=!"'],
        ['"v=spf1 -all"'],
        [],
    ],
)
async def test_without_one_valid_record_nothing_new_is_fetched_and_what_is_kept_stays(
    bench: StsBench, records: list[str]
) -> None:
    good = bench.dns.zone[RECORD]
    bench.dns.zone[RECORD] = records
    assert await bench.policies.find(DOMAIN) is None
    assert bench.fetches == 0
    later(bench)
    bench.dns.zone[RECORD] = good
    assert await bench.policies.find(DOMAIN) == POLICY
    later(bench)
    bench.dns.zone[RECORD] = records
    assert await bench.policies.find(DOMAIN) == POLICY
    assert bench.fetches == 1


async def test_other_records_beside_it_and_split_strings_do_not_matter(bench: StsBench) -> None:
    bench.dns.zone[RECORD] = ['"v=spf1 -all"', '"v=STS" "v1; i" "d=1;"']
    assert await bench.policies.find(DOMAIN) == POLICY


@pytest.mark.parametrize("trouble", [SERVFAIL, None])
async def test_name_servers_without_an_answer_leave_a_kept_policy_and_else_the_mail_waits(
    bench: StsBench, trouble: int | None
) -> None:
    good = bench.dns.zone[RECORD]
    bench.dns.zone[RECORD] = trouble
    with pytest.raises(PolicyUnknown, match=DOMAIN):
        await bench.policies.find(DOMAIN)
    bench.dns.zone[RECORD] = good
    assert await bench.policies.find(DOMAIN) == POLICY
    bench.dns.zone[RECORD] = trouble
    later(bench)
    assert await bench.policies.find(DOMAIN) == POLICY
    later(bench, 8 * DAY)
    with pytest.raises(PolicyUnknown):
        await bench.policies.find(DOMAIN)


async def test_a_domain_without_the_record_costs_one_question_in_its_time(bench: StsBench) -> None:
    bench.publish(None)
    for _ in range(3):
        assert await bench.policies.find(DOMAIN) is None
    assert bench.dns.questions[RECORD] == 1 and bench.fetches == 0


# The cache


async def test_a_kept_policy_is_used_while_the_id_is_the_same(bench: StsBench) -> None:
    for _ in range(3):
        assert await bench.policies.find(DOMAIN) == POLICY
        later(bench)
    assert (bench.fetches, bench.dns.questions[RECORD]) == (1, 3)


async def test_a_new_id_brings_the_new_policy(bench: StsBench) -> None:
    await bench.policies.find(DOMAIN)
    bench.publish("2", policy_text("testing", "*.m.example"))
    assert await bench.policies.find(DOMAIN) == POLICY
    later(bench)
    assert await bench.policies.find(DOMAIN) == StsPolicy(
        DOMAIN, "2", StsMode.TESTING, ("*.m.example",)
    )
    assert bench.fetches == 2


async def test_a_policy_expires_by_its_max_age_from_the_fetch(bench: StsBench) -> None:
    bench.publish("1", policy_text(max_age=7200))
    await bench.policies.find(DOMAIN)
    bench.publish(None)
    later(bench, 3601)
    assert await bench.policies.find(DOMAIN) == POLICY
    later(bench, 3600)
    assert await bench.policies.find(DOMAIN) is None


async def test_an_expired_policy_with_the_same_id_is_fetched_again(bench: StsBench) -> None:
    bench.publish("1", policy_text(max_age=7200))
    await bench.policies.find(DOMAIN)
    later(bench, 7201)
    assert await bench.policies.find(DOMAIN) == POLICY
    assert bench.fetches == 2


async def test_a_max_age_of_nothing_is_five_minutes_and_one_without_end_is_a_year(
    bench: StsBench,
) -> None:
    bench.publish("1", policy_text(max_age=0))
    assert await bench.policies.find(DOMAIN) == POLICY
    later(bench, 299)
    bench.publish(None)
    assert await bench.policies.find(DOMAIN) == POLICY
    later(bench, 2)
    assert await bench.policies.find(DOMAIN) is None
    bench.publish("2", policy_text(max_age=9_999_999_999))
    later(bench)
    await bench.policies.find(DOMAIN)
    entry = StsFile(bench.config.queue_directory).get(DOMAIN)
    assert entry is not None and entry.expires - entry.fetched == 31_557_600


async def test_mode_none_is_no_policy_and_ends_the_one_before(bench: StsBench) -> None:
    assert await bench.policies.find(DOMAIN) == POLICY
    bench.publish("2", b"version: STSv1\nmode: none\nmax_age: 86400\n")
    later(bench)
    assert await bench.policies.find(DOMAIN) is None
    later(bench)
    assert await bench.policies.find(DOMAIN) is None
    assert bench.fetches == 2


async def test_tasks_that_ask_together_share_one_fetch(bench: StsBench) -> None:
    found: list[StsPolicy | None] = []

    async def ask() -> None:
        found.append(await bench.policies.find(DOMAIN))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert found == [POLICY] * 20
    assert (bench.fetches, bench.dns.questions[RECORD]) == (1, 1)


async def test_a_task_that_gives_up_leaves_the_question_to_the_others(bench: StsBench) -> None:
    asked, go_on = trio.Event(), trio.Event()

    async def slow(stream: Stream) -> None:
        asked.set()
        await go_on.wait()
        await stream.send_all(response(policy_text()))

    bench.web.answer = slow
    first = trio.CancelScope()
    found: list[StsPolicy | None] = []

    async def give_up() -> None:
        with first:
            await bench.policies.find(DOMAIN)

    async def wait() -> None:
        found.append(await bench.policies.find(DOMAIN))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        await asked.wait()
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        go_on.set()
    assert found == [POLICY]


async def test_a_policy_survives_a_restart_and_is_shared_by_processes(bench: StsBench) -> None:
    assert await bench.policies.find(DOMAIN) == POLICY
    bench.web.answer = response(b"", status=500)
    other = bench.open()
    assert await other.find(DOMAIN) == POLICY
    bench.publish("2", policy_text("testing"))
    later(bench)
    assert (await other.find(DOMAIN)) == StsPolicy(DOMAIN, "2", StsMode.TESTING, ("mx.d.example",))
    later(bench)
    found = await bench.policies.find(DOMAIN)
    assert found is not None and found.id == "2"
    assert bench.fetches == 2


async def test_a_setting_turns_it_off(bench: StsBench) -> None:
    assert await bench.open(mta_sts=False).find(DOMAIN) is None
    assert await bench.policies.find("[192.0.2.1]") is None
    assert not bench.dns.questions


# Fetches that fail


async def redirect(bench: StsBench) -> None:
    bench.web.answer = response(b"", status=301, more=f"Location: https://{HOST}/x\r\n")


async def missing(bench: StsBench) -> None:
    bench.web.answer = response(policy_text("none"), status=404)


async def wrong_name(bench: StsBench) -> None:
    bench.web.certify("www.d.example")
    bench.web.certificates.pop(HOST)


async def wrong_issuer(bench: StsBench) -> None:
    bench.web.certify(HOST, trustme.CA())


async def over(bench: StsBench) -> None:
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    bench.web.certify(HOST, not_before=start, not_after=start + datetime.timedelta(days=9))


async def packed(bench: StsBench) -> None:
    body = gzip.compress(policy_text("none"))
    bench.web.answer = response(body, more="Content-Encoding: gzip\r\n")


async def huge(bench: StsBench) -> None:
    bench.web.answer = response(policy_text("none") + b"x: y\r\n" * 20_000)


async def page(bench: StsBench) -> None:
    bench.web.answer = response(policy_text("none"), kind="text/html")


async def broken(bench: StsBench) -> None:
    bench.web.answer = response(policy_text("none").replace(b"version", b"Version"))


async def silent(bench: StsBench) -> None:
    bench.dns.zone[HOST, "A"] = None


async def unknown(bench: StsBench) -> None:
    bench.dns.zone[HOST, "A"] = []


async def closed(bench: StsBench) -> None:
    async def close(stream: Stream) -> None:
        await trio.aclose_forcefully(stream)

    bench.web.answer = close


TROUBLES = {
    redirect: Reason.STS_FETCH,
    missing: Reason.STS_FETCH,
    packed: Reason.STS_FETCH,
    huge: Reason.STS_FETCH,
    page: Reason.STS_FETCH,
    silent: Reason.STS_FETCH,
    unknown: Reason.STS_FETCH,
    closed: Reason.STS_FETCH,
    broken: Reason.STS_INVALID,
    wrong_name: Reason.STS_WEBPKI,
    wrong_issuer: Reason.STS_WEBPKI,
    over: Reason.STS_WEBPKI,
}


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda each: each.__name__)
async def test_a_failed_fetch_is_no_policy_and_never_ends_one(
    bench: StsBench, trouble: Any
) -> None:
    await trouble(bench)
    assert await bench.policies.find(DOMAIN) is None
    ((domain, policy, failed),) = bench.failures
    assert (domain, policy, failed.reason) == (DOMAIN, None, TROUBLES[trouble])
    assert len(bench.web.requests) <= 1


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda each: each.__name__)
async def test_a_new_id_whose_fetch_fails_leaves_the_policy_before(
    bench: StsBench, trouble: Any
) -> None:
    assert await bench.policies.find(DOMAIN) == POLICY
    bench.publish("2")
    await trouble(bench)
    later(bench)
    assert await bench.policies.find(DOMAIN) == POLICY
    ((_, policy, failed),) = bench.failures
    assert policy == POLICY and failed.reason is TROUBLES[trouble]
    assert await bench.open().find(DOMAIN) == POLICY


async def test_a_failed_fetch_is_not_repeated_for_the_id_within_five_minutes(
    bench: StsBench,
) -> None:
    bench.web.answer = response(b"", status=503)
    assert await bench.policies.find(DOMAIN) is None
    for _ in range(4):
        later(bench, FAILED_SECONDS / 5)
        bench.policies.forget()
        assert await bench.policies.find(DOMAIN) is None
        assert await bench.open().find(DOMAIN) is None
    assert bench.fetches == 1
    bench.publish("2")
    bench.policies.forget()
    assert await bench.policies.find(DOMAIN) is None
    assert bench.fetches == 2
    later(bench, FAILED_SECONDS + 1)
    bench.publish("2", policy_text())
    found = await bench.policies.find(DOMAIN)
    assert found is not None and found.id == "2"


async def test_a_policy_server_on_a_forbidden_address_is_not_asked(bench: StsBench) -> None:
    policies = bench.open(smtp_out_forbidden=["127.0.0.0/8"])
    assert await policies.find(DOMAIN) is None
    assert bench.web.connections == 0
    assert bench.failures[0][2].text.startswith("forbidden")


async def test_a_missing_file_of_authorities_is_no_fault_of_the_domain(
    bench: StsBench, caplog: pytest.LogCaptureFixture
) -> None:
    assert await bench.open(connection_ca_file="/nonexistent").find(DOMAIN) is None
    assert "/nonexistent" in caplog.text and not bench.failures


async def test_a_body_that_drips_ends(
    bench: StsBench, autojump_clock: trio.testing.MockClock
) -> None:
    async def drip(stream: Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 x\r\nContent-Length: 60000\r\n\r\n")
        while True:
            await stream.send_all(b"x")
            await trio.sleep(1)

    bench.web.answer = drip
    autojump_clock.autojump_threshold = 0.05
    assert await bench.policies.find(DOMAIN) is None
    assert trio.current_time() < 70


@no_turn_above(0.05)
async def test_no_turn_of_the_loop_is_long_for_a_large_policy(tmp_path: Path) -> Meter:
    names = [f"ä{number}.{'ö.' * 26}example" for number in range(MAX_PATTERNS)]
    text = policy_text("enforce", *names)
    assert 15_000 < len(text) < 65536
    async with open_sts_bench(tmp_path) as bench:
        bench.publish("1", text)
        with meter() as turns:
            found = await bench.policies.find(DOMAIN)
            assert await bench.open().find(DOMAIN) == found
    assert found is not None and len(found.mx_patterns) == MAX_PATTERNS
    return turns


# A delivery that fails by the policy


async def test_after_a_failed_delivery_the_next_attempt_looks_for_another_id(
    bench: StsBench,
) -> None:
    assert await bench.policies.find(DOMAIN) == POLICY
    bench.publish("2", policy_text("enforce", "new.d.example"))
    assert await bench.policies.find(DOMAIN) == POLICY
    bench.policies.doubt(DOMAIN)
    found = await bench.policies.find(DOMAIN)
    assert found is not None and found.allows("new.d.example")


# Without mail


async def test_a_policy_is_fetched_again_before_it_expires_without_mail(bench: StsBench) -> None:
    await bench.policies.find(DOMAIN)
    for day in range(1, 30):
        bench.clock.now += DAY
        await bench.policies.round()
        assert bench.fetches == 1 + day
    bench.publish(None)
    assert await bench.policies.find(DOMAIN) == POLICY


async def test_a_short_policy_is_fetched_again_in_the_middle_of_its_time(bench: StsBench) -> None:
    bench.publish("1", policy_text(max_age=6 * 3600))
    await bench.policies.find(DOMAIN)
    later(bench, 2 * 3600)
    await bench.policies.round()
    assert bench.fetches == 1
    later(bench, 3600 + 1)
    await bench.policies.round()
    assert bench.fetches == 2


async def test_a_refresh_without_a_record_or_without_a_policy_leaves_the_policy(
    bench: StsBench,
) -> None:
    await bench.policies.find(DOMAIN)
    bench.publish(None)
    later(bench, DAY)
    await bench.policies.round()
    bench.publish("1")
    bench.web.answer = response(b"", status=500)
    later(bench, 2 * 3600)
    await bench.policies.round()
    await bench.policies.round()
    assert bench.fetches == 2
    assert await bench.policies.find(DOMAIN) == POLICY


async def test_a_policy_without_mail_for_half_a_year_is_forgotten(bench: StsBench) -> None:
    await bench.policies.find(DOMAIN)
    start, fetches = bench.clock.now, 0
    while bench.clock.now < start + 181 * DAY:
        bench.clock.now += 6 * DAY
        await bench.policies.round()
        assert bench.fetches >= fetches
        fetches = bench.fetches
    await bench.policies.round()
    assert StsFile(bench.config.queue_directory).get(DOMAIN) is None


async def test_use_keeps_a_policy(bench: StsBench) -> None:
    start = bench.clock.now
    while bench.clock.now < start + 200 * DAY:
        assert await bench.policies.find(DOMAIN) == POLICY
        bench.clock.now += 5 * DAY
        await bench.policies.round()
    assert StsFile(bench.config.queue_directory).get(DOMAIN) is not None


# Trouble with the file


async def test_a_damaged_file_is_set_aside_and_policies_go_on(bench: StsBench) -> None:
    await bench.policies.find(DOMAIN)
    path = Path(bench.config.queue_directory) / "sts-policies"
    StsFile(bench.config.queue_directory).close()
    for suffix in ("-wal", "-shm"):
        if os.path.exists(f"{path}{suffix}"):
            os.unlink(f"{path}{suffix}")
    path.unlink()
    path.write_bytes(b"\xff" * 8192)
    assert await bench.open().find(DOMAIN) == POLICY
    names = os.listdir(bench.config.queue_directory)
    assert any("damaged" in name for name in names)
    assert (await bench.open().find(DOMAIN)) == POLICY
    assert bench.fetches == 2


async def test_while_the_file_cannot_be_used_memory_keeps_the_policy(
    bench: StsBench, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(bench.config.queue_directory)
    path.rmdir()
    assert await bench.policies.find(DOMAIN) == POLICY
    assert "not kept" in caplog.text
    bench.web.answer = response(b"", status=500)
    bench.publish("2")
    later(bench)
    assert await bench.policies.find(DOMAIN) == POLICY
    path.mkdir()
    bench.web.answer = response(policy_text())
    later(bench)
    found = await bench.policies.find(DOMAIN)
    assert found is not None and found.id == "2"
    assert await bench.open().find(DOMAIN) == found
    assert (path / "sts-policies").exists()


# By command


async def test_a_refresh_by_command_says_what_went_wrong(bench: StsBench) -> None:
    kept, problem = await bench.policies.refresh(DOMAIN)
    assert kept is not None and kept.policy(bench.clock.now) == POLICY and not problem
    bench.web.answer = response(b"", status=500)
    kept, problem = await bench.policies.refresh(DOMAIN)
    assert kept is not None and "500" in problem
    bench.publish(None)
    kept, problem = await bench.policies.refresh(DOMAIN)
    assert kept is not None and "no record" in problem
    bench.dns.zone[RECORD] = SERVFAIL
    kept, problem = await bench.policies.refresh(DOMAIN)
    assert kept is not None and problem
    assert await bench.policies.find(DOMAIN) == POLICY
