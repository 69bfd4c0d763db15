"""What `mailerq explain` says of a message is what becomes of the message."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mailerq.outbound.explaining import Question
from mailerq.rules.row import ERROR, PAUSE, SUPPRESSION, Row, suppressible
from mailerq.rules.rows import Rows
from tests.outbound.kit import Bench, StubResolver, open_bench
from tests.outbound.test_stops import rest

ONE, TWO = "127.0.0.3", "127.0.0.4"

POOL = f'[[pool]]\nname = "bulk"\naddresses = ["{ONE}"]\n'

PROVIDER = '[[provider]]\nname = "big"\nmx = ["d.test"]\n'


@dataclass(frozen=True)
class Case:
    """A message, and the rows and limits that it meets."""

    name: str
    rows: tuple[Row, ...] = ()
    suppressed: tuple[str, ...] = ()
    limits: str = ""
    recipient: str = "ann@d.test"
    ips: tuple[str, ...] = ()
    pool: str = ""
    tags: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("127.0.0.1",)
    decision: str = "send"
    local: tuple[str, ...] = field(default=())
    """The addresses that the message may leave from."""


def pause(**scope: str) -> Row:
    return Row(id=1, kind=PAUSE, **scope)


def error(code: int, number: int = 1, **scope: str) -> Row:
    return Row(id=number, kind=ERROR, code=code, description="so be it", **scope)


def limit(values: str, **scope: str) -> str:
    lines = [f'{name.replace("_", "-")} = "{value}"' for name, value in scope.items()]
    return "\n".join([PROVIDER, "[[limit]]", *lines, values, ""])


CLOSED = 'hours = "20:00-06:00"'  # the clock of the bench shows noon
OPEN = 'hours = "08:00-20:00"'

CASES = [
    Case("nothing"),
    Case("a pause of the domain", (pause(domain="d.test"),), decision="wait"),
    Case("a pause of all below", (pause(domain="*.test"),), decision="wait"),
    Case("a pause of what is below the domain", (pause(domain="*.d.test"),)),
    Case("a pause of another domain", (pause(domain="e.test"),)),
    Case("a pause of everything", (pause(),), decision="wait"),
    Case("a pause of the site", (pause(site="mx0.d.test"),), decision="wait"),
    Case("a pause of another site", (pause(site="*.e.test"),)),
    Case(
        "a pause of the provider", (pause(provider="big"),),
        limits=limit("max-connections = 9", provider="big"), decision="wait",
    ),
    Case("a pause of a provider that is gone", (pause(provider="gone"),)),
    Case("a pause of the host", (pause(remote_ip="127.0.0.1"),), decision="wait"),
    Case("a pause of its network", (pause(remote_ip="127.0.0.0/8"),), decision="wait"),
    Case(
        "a pause of one of two hosts", (pause(remote_ip="127.0.0.1"),),
        hosts=("127.0.0.1", "127.0.0.2"),
    ),
    Case("a pause of our address", (pause(local_ip=ONE),), ips=(ONE,), decision="wait"),
    Case("a pause of one of ours", (pause(local_ip=ONE),), ips=(ONE, TWO), local=(TWO,)),
    Case("a pause of ours by another name", (pause(local_ip=ONE),), ips=(f"::ffff:{ONE}",),
         decision="wait"),
    Case("closed hours of ours by another name", limits=limit(CLOSED, local_ip=ONE),
         ips=(f"[{ONE}]", f"::ffff:{ONE}"), decision="wait"),
    Case("a pause of one that is not ours", (pause(local_ip="192.0.2.9"),), ips=(ONE,)),
    Case("a pause of the pool", (pause(pool="bulk"),), pool="bulk", decision="wait"),
    Case("a pause of a pool that is gone", (pause(pool="gone"),), pool="bulk"),
    Case("a pause of another pool", (pause(pool="bulk"),), ips=(TWO,)),
    Case("a pause of the tag", (pause(tag="news"),), tags=("a", "news"), decision="wait"),
    Case("a pause of another tag", (pause(tag="news"),), tags=("a",)),
    Case(
        "a pause of the tag at the site", (pause(tag="news", site="mx0.d.test"),),
        tags=("news",), decision="wait",
    ),
    Case(
        "a pause of the tag at the site from one of ours",
        (pause(tag="news", site="mx0.d.test", local_ip=ONE),),
        tags=("news",), ips=(ONE, TWO), local=(TWO,),
    ),
    Case("an error", (error(550, domain="d.test"),), decision="fail"),
    Case("an error for later", (error(451, domain="d.test"),), decision="wait"),
    Case("an error that takes it", (error(250, domain="d.test"),), decision="done"),
    Case("an error of the site", (error(550, site="*.d.test"),), decision="fail"),
    Case("an error from the pool", (error(554, pool="bulk"),), pool="bulk", decision="fail"),
    Case(
        "an error of the site from one of ours", (error(550, site="*.d.test", local_ip=ONE),),
        ips=(ONE, TWO), local=(TWO,),
    ),
    Case("an error before a pause", (pause(), error(550, 2)), decision="fail"),
    Case("a suppressed address", suppressed=("Ann@D.test",), decision="fail"),
    Case("a suppressed domain", suppressed=("d.test",), decision="fail"),
    Case("suppressed domains above", suppressed=("*.test",), decision="fail"),
    Case("suppressed domains below", suppressed=("*.d.test", "bob@d.test")),
    Case(
        "quotes around a suppressed address", suppressed=("ann@d.test",),
        recipient='"ann"@d.test', decision="fail",
    ),
    Case("a suppressed address with a tag of its own", suppressed=("ann@d.test",),
         recipient="ann+x@d.test"),
    Case("a suppression before a pause", (pause(),), ("ann@d.test",), decision="fail"),
    Case("closed hours", limits=limit(CLOSED, domain="d.test"), decision="wait"),
    Case("open hours", limits=limit(OPEN, domain="d.test")),
    Case("closed hours of the provider", limits=limit(CLOSED, provider="big"), decision="wait"),
    Case(
        "closed hours of one of ours", limits=limit(CLOSED, local_ip=ONE), ips=(ONE, TWO),
        local=(TWO,),
    ),
    Case(
        "closed hours of one, a pause of the other", (pause(local_ip=TWO),),
        limits=limit(CLOSED, local_ip=ONE), ips=(ONE, TWO), decision="wait",
    ),
    Case("a rate", limits=limit("messages-per-minute = 1", domain="d.test")),
    Case("a limit that is taken back", limits=limit("max-connections = -1", domain="d.test")),
    Case("no limit", limits=limit("max-connections = 0", domain="d.test")),
    Case("hosts that are not found", recipient="ann@none.test", decision="wait"),
]  # fmt: skip


def rows_of(case: Case) -> Rows | None:
    row = Row(id=9, kind=SUPPRESSION, code=550, status="5.7.1", description="complained")
    names = [suppressible(each) for each in case.suppressed]
    return Rows(
        case.rows,
        addresses={name: row for name in names if "@" in name},
        domains={name: row for name in names if "@" not in name},
        pools={"bulk": (ONE,)},
    ) or None  # fmt: skip


def result_of(bench: Bench) -> tuple[str, dict[str, Any]]:
    """What became of the message, in the words of explain, and its last result."""
    for queue, decision in (("success", "send"), ("failure", "fail"), ("retry", "wait")):
        if messages := bench.queues[queue]:
            result = messages[0].results[-1]
            if decision == "send" and not bench.peer.mails:
                decision = "done"
            return decision, result
    return "wait", {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
async def test_what_is_explained_is_what_happens(tmp_path: Path, case: Case) -> None:
    (tmp_path / "limits.toml").write_text(case.limits)
    (tmp_path / "addresses.toml").write_text(POOL)
    async with open_bench(
        resolver=StubResolver(d_test=list(case.hosts)),
        address="0.0.0.0",
        limits_file=str(tmp_path / "limits.toml"),
        addresses_file=str(tmp_path / "addresses.toml"),
    ) as bench:
        bench.dispatcher.stops.change(rows_of(case))
        question = Question(case.recipient, "a@b.test", case.ips, case.pool, case.tags)
        explained = await bench.dispatcher.seeing.explainer().explain(question)
        properties = {
            name: list(value) if name != "pool" else value
            for name in ("ips", "pool", "tags")
            if (value := getattr(case, name))
        }
        bench.send(case.recipient, **properties)
        await rest(bench)
        decision, result = result_of(bench)
        assert (explained["decision"], decision) == (case.decision, case.decision)
        if decision == "send":
            sources = {part["local-ip"] for part in explained["from"] if not _waits(part)}
            assert sources == ({*case.local} or {*case.ips} or {ONE if case.pool else None})
            assert sources == {None} or result["from"] in sources
        elif result:
            said = (result.get(name) for name in ("code", "status", "description"))
            assert explained["reason"] == " ".join(str(each) for each in said if each)
        else:
            assert not bench.peer.connections
            assert explained["reason"]


def _waits(part: dict[str, Any]) -> bool:
    return "paused" in part or any(each["limit"] == "closed" for each in part["limits"])
