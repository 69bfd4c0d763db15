"""A domain with an MTA-STS policy on real servers, and what finds it, by a clock of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mailerq.config import Config
from mailerq.live import Live
from mailerq.net.https import Https
from mailerq.net.resolver import Resolver
from mailerq.outbound.sts import FetchFailed, StsPolicies
from mailerq.rules.security import StsPolicy
from mailerq.store.sts_file import StsFile
from tests.net.dns_server import DnsServer, open_dns_server
from tests.net.https_server import HttpsServer, open_https_server, response

DOMAIN = "d.example"
HOST = "mta-sts.d.example"
DAY = 86400.0


def policy_text(mode: str = "enforce", *mx: str, max_age: int = 604800) -> bytes:
    hosts = "".join(f"mx: {each}\r\n" for each in mx or ("mx.d.example",))
    return f"version: STSv1\r\nmode: {mode}\r\n{hosts}max_age: {max_age}\r\n".encode()


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class StsBench:
    """`open` makes another process; `directory` is that of the queue."""

    directory: Path
    dns: DnsServer
    web: HttpsServer
    config: Config
    clock: Clock
    policies: StsPolicies
    failures: list[tuple[str, StsPolicy | None, FetchFailed]] = field(default_factory=list)

    def open(self, **settings: Any) -> StsPolicies:
        """What another process has."""
        config = self.config.replace(**settings)
        resolver = Resolver(config)
        return StsPolicies(
            Live(config),
            resolver,
            Https(resolver.addresses),
            StsFile(config.queue_directory, clock=self.clock),
            report=lambda *values: self.failures.append(values),
            clock=self.clock,
            lot=lambda: 0.5,
        )

    def publish(self, number: str | None, text: bytes | None = None) -> None:
        """Have the domain publish a record, or none, and a policy."""
        records = [] if number is None else [f'"v=STSv1; id={number};"']
        self.dns.zone["_mta-sts.d.example", "TXT"] = records
        if text is not None:
            self.web.answer = response(text)

    @property
    def fetches(self) -> int:
        return len(self.web.requests)


@asynccontextmanager
async def open_sts_bench(directory: Path, **settings: Any) -> AsyncIterator[StsBench]:
    zone: dict[tuple[str, str], Any] = {
        ("_mta-sts.d.example", "TXT"): ['"v=STSv1; id=1;"'],
        (HOST, "A"): ["127.0.0.1"],
    }
    (directory / "queue").mkdir()
    async with (
        open_dns_server(zone) as dns,
        open_https_server(directory, HOST) as web,
    ):
        web.answer = response(policy_text())
        config = Config(**{
            "hostname": "me.example",
            "queue_directory": str(directory / "queue"),
            "dns_servers": [dns.address],
            "dns_timeout": 2.0,
            "dns_attempts": 1,
            "smtp_out_forbidden": (),
            "mta_sts_port": web.port,
            "connection_ca_file": web.ca_file,
            **settings,
        })  # fmt: skip
        clock = Clock()
        bench = StsBench(directory, dns, web, config, clock, None)  # type: ignore[arg-type]
        bench.policies = bench.open()
        yield bench
