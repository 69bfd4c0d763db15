"""Measure the cost of undeliverable mail, for other mail and for the host.

    python benches/flows.py [--full] [--only SCENARIO,…] [--rounds N] [--json]

Every scenario starts the project on a filled queue, beside peers with scripted behaviour
(scripted.py). Fresh mail comes in by SMTP and goes to a healthy peer; its time is compared with the
time on an empty queue, measured right before. Messages of the backlog name their peer as their
smarthost, so no port below 1024 and no DNS is needed.

- ``behind``: 100,000 wait for one peer that is refusing, silent, slow, or says 421 at the banner;
  for a healthy one with a limit, or with an operator's pause; or for one that is probed every two
  seconds, because it says that mail comes too fast. Measures the time until the healthy peer has
  the last of 1,000 fresh messages, and the time of a lone message.
- ``idle``: no fresh mail, half a minute with a refusing and half a minute with a silent peer:
  processor time, commits, reads, bytes.
- ``many``: 5,000 destinations with 10 messages each, interleaved, against one destination with
  as many: the rate. While none can be reached, against half as many destinations: the memory of
  each, without that of the messages which are in memory in both cases.
- ``silent``: 60 silent hosts with 1,000 each. Fresh mail as above, and 300 clients that connect at
  once: how many of them get the banner 220.
- ``closing``: a peer that closes after each 250: how many messages lose an attempt by that.
- ``limited``: the rate of a destination with a limit, with one process and with two.
- ``postfix``: the project and Postfix in turns, on a backlog of 10,000 that came in by SMTP: fresh
  mail as in ``behind``.

A measurement that exceeds --timeout is given up, and its figure is a lower bound.
"""

from __future__ import annotations

import argparse
import math
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any, BinaryIO, Final

import trio
from figures import Figure, print_document, progress
from peers import LOOPBACK, Destination, Failed, Mailerq, Postfix, Program, Unavailable, machine
from scripted import BUSY, Refusing, Scripted, reserve

from mailerq import Config, Engine
from mailerq.cli.control import ask

FULL: Final = 1_000_000
FRESH: Final = 1000
CLIENTS: Final = 10
LONE: Final = 5
FILL_MARGIN: Final = 2.0
"""Factor on the time of the sample: other load may slow the machine."""

PAUSE_SECONDS: Final = 0.1
SILENT_HOSTS: Final = 60
NEW_CLIENTS: Final = 300
PUBLISHERS: Final = 500
SAMPLE: Final = 5000
"""Sample size for the fill rate of a queue."""

MEET_SECONDS: Final = 5.0
"""From the banner until fresh mail arrives: time for the backlog to meet its peer."""

BANNER_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.002
BODY: Final = b"Subject: flow\r\n\r\n" + 4 * (b"x" * 62 + b"\r\n")
BAD_HOST: Final = "127.0.0.2"
LIMITED_HOST: Final = f"[[limit]]\nremote-ip = '{BAD_HOST}'\nmessages-per-minute = 600\n"
PROBE_SECONDS: Final = 2
BUSY_PEER: Final = f"""
[[response]]
name = "busy"
code = "4xx"
text = "mail comes too fast"
class = "reputation-temp"
pause = "{PROBE_SECONDS}s"
max-pause = "{PROBE_SECONDS}s"
samples = ["{BUSY.decode().strip()}"]
"""
BAD_DOMAIN: Final = "bad.test"
RATE: Final = 10
LIMITED_DOMAIN: Final = f"[[limit]]\ndomain = 'b.test'\nmessages-per-minute = {60 * RATE}\n"

BadPeer = Scripted | Refusing
Mail = tuple[Sequence[bytes], bytes]
"""The commands of an envelope, and a body."""


# -- a queue that is full at the start -------------------------------------------------------


def document(number: int, **more: Any) -> dict[str, Any]:
    mail = {"envelope": "c@d.test", "recipient": f"r{number}@b.test", "mime": BODY}
    return {**mail, **more}


def to_host(number: int, host: str, port: int) -> dict[str, Any]:
    """A message that goes to one host, whatever its domain."""
    return document(number, smarthost={"hostname": host, "port": port})


def to_domain(number: int, domains: int) -> dict[str, Any]:
    """A message to one of several domains, in turns."""
    return document(number, recipient=f"r{number}@b{number % domains}.test")


def fill(directory: Path, count: int, make: Callable[[int], dict[str, Any]]) -> None:
    """Publish messages to the outbox of a queue directory, and wait until all are due.

    The publishing engine must deliver none. A sample shows how long publishing takes.
    """
    sample = directory.with_name(directory.name + "-sample")
    took = trio.run(_publish, sample, min(SAMPLE, count), make, time.time() + 3600.0)
    rmtree(sample)
    due = time.time() + FILL_MARGIN * took * count / min(SAMPLE, count) + 3.0
    took = trio.run(_publish, directory, count, make, due)
    left = due - time.time()
    progress(f"{count:,} published in {took:.0f} s, due in {left:.0f} s")
    if left < 0:
        raise Failed("it took longer than the sample promised: some may be delivered already")
    time.sleep(left)


async def _publish(
    directory: Path, count: int, make: Callable[[int], dict[str, Any]], due: float
) -> float:
    """Publish with a due time; returns the seconds taken."""
    config = Config(
        queue_directory=str(directory), plugin_directory="", smtp_ip=(LOOPBACK,), smtp_port=(0,)
    )
    numbers = iter(range(count))

    async def publish() -> None:
        for number in numbers:
            await engine.publish(make(number), due=due)

    async with Engine(config) as engine:
        start = time.monotonic()
        async with trio.open_nursery() as nursery:
            for _ in range(PUBLISHERS):
                nursery.start_soon(publish)
        return time.monotonic() - start


# -- the project, and fresh mail through it --------------------------------------------------


def relay(
    directory: Path, healthy: Destination, *, queue: Path | None = None, options: Sequence[str] = ()
) -> Mailerq:
    """The project on a copy of a queue; mail without a smarthost goes to a healthy peer."""
    if queue is not None:
        copytree(queue, directory / "queue")
    options = [
        *options,
        "--smtp-sink-address=0.0.0.0",  # none
        "--smtp-out-forbidden=",
        f"--smarthost={healthy.host}",
        f"--smarthost-port={healthy.port}",
    ]
    return Mailerq(directory, healthy, name=directory.name, options=options)


def with_file(directory: Path, setting: str, text: str) -> list[str]:
    """The option for a setting that names a file with this text."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{setting}.toml"
    path.write_text(text)
    return [f"--{setting}={path}"]


FRESH_MAIL: Final = (
    (b"MAIL FROM:<c@d.test>\r\n", b"RCPT TO:<fresh@b.test>\r\n", b"DATA\r\n"),
    BODY,
)


def send(system: Program, count: int, deadline: float, mail: Mail = FRESH_MAIL) -> None:
    """Send messages over one connection; retry on another one until the banner is 220.

    The server sees a pipelined envelope and then a body. Raises OSError, also at the deadline.
    """
    envelope, body = mail
    while True:
        with (
            socket.create_connection((system.host, system.port), _left(deadline)) as client,
            client.makefile("rb") as replies,
        ):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if replies.readline().startswith(b"220"):
                _say(client, replies, (b"EHLO client.test\r\n",), deadline)
                for _ in range(count):
                    _say(client, replies, envelope, deadline)
                    _say(client, replies, (body + b".\r\n",), deadline)
                return
        time.sleep(PAUSE_SECONDS)


def _say(
    client: socket.socket, replies: BinaryIO, commands: Sequence[bytes], deadline: float
) -> None:
    client.settimeout(_left(deadline))
    client.sendall(b"".join(commands))
    for command in commands:
        while (reply := replies.readline())[3:4] == b"-":
            pass
        if reply[:1] not in (b"2", b"3"):
            raise OSError(f"{reply!r} to {command[:20]!r}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no mail is taken in time")
    return left


class Backlog:
    """A queue full of messages for one peer, made on first use."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.count = count
        self.port = reserve([BAD_HOST])

    @cached_property
    def queue(self) -> Path:
        queue = self.directory / "backlog"
        fill(queue, self.count, lambda number: to_host(number, BAD_HOST, self.port))
        return queue


@dataclass(slots=True)
class Taken:
    """The time of all messages together; `lost`: why the time is only a lower bound."""

    seconds: float
    lost: str = ""


def burst(system: Program, healthy: Scripted, count: int, clients: int, timeout: float) -> Taken:
    """Send fresh messages; returns the time until the healthy peer has the last."""
    start, before = time.monotonic(), healthy.mails
    deadline = start + timeout
    problem = ""
    try:
        with ThreadPoolExecutor(clients) as pool:
            sent = [pool.submit(send, system, count // clients, deadline) for _ in range(clients)]
            for each in sent:
                each.result()
    except OSError as error:
        problem = f"clients: {str(error) or type(error).__name__}"
    while healthy.mails < before + count:
        system.check()
        if time.monotonic() > deadline or problem:
            arrived = healthy.mails - before
            return Taken(timeout, f"{arrived:,} of {count:,} out; {problem or 'given up'}")
        time.sleep(POLL_SECONDS)
    return Taken(healthy.last - start)


def fresh(system: Program, healthy: Scripted, options: argparse.Namespace) -> list[Taken]:
    """Send fresh messages one by one, then many at once; returns the medians of each."""
    found = []
    for count, clients, rounds in ((1, 1, LONE), (FRESH, CLIENTS, options.rounds)):
        taken: list[Taken] = []
        while len(taken) < rounds and not (taken and taken[-1].lost):
            taken.append(burst(system, healthy, count, clients, options.timeout))
            time.sleep(PAUSE_SECONDS)
        if not taken[-1].lost:
            taken = [Taken(statistics.median(each.seconds for each in taken))]
        found.append(taken[-1])
    return found


def fresh_alone(directory: Path, options: argparse.Namespace) -> list[Taken]:
    """Send fresh mail through an empty queue, while nothing else runs."""
    with Scripted(directory / "peer", "healthy") as healthy, relay(directory, healthy) as system:
        return fresh(system, healthy, options)


def compare(behind: Sequence[Taken], alone: Sequence[Taken], what: str) -> list[Figure]:
    """The ratio of fresh mail to fresh mail alone; a lower bound if a measurement was given up."""
    figures = []
    for text, one, other in zip(("a lone message", f"{FRESH:,}"), behind, alone, strict=True):
        if other.lost:
            raise Failed(f"{text} alone: {other.lost}")
        detail = f"{1000 * one.seconds:,.1f} and {1000 * other.seconds:,.1f} ms"
        if one.lost:
            detail = f"more than {detail}: {one.lost}"
        figures.append(Figure(f"{what}, {text}", one.seconds / other.seconds, "times", detail))
        progress(f"{figures[-1].name}: {figures[-1].text}, {detail}")
    return figures


# -- scenarios -------------------------------------------------------------------------------


def peer(directory: Path, kind: str, addresses: Sequence[str], port: int) -> BadPeer:
    if kind == "refusing":
        return Refusing(addresses, port)
    kind = {"limited": "healthy", "paused": "healthy", "probed": "busy"}.get(kind, kind)
    return Scripted(directory, kind, addresses=addresses, port=port)


def reasons(directory: Path, kind: str) -> list[str]:
    """The options that make the project hold the mail for a peer."""
    if kind == "limited":
        return with_file(directory, "limits-file", LIMITED_HOST)
    if kind == "probed":
        return with_file(directory, "responses-file", BUSY_PEER)
    if kind == "paused":
        queue = directory / "queue"
        pause = ["pause", "add", f"--queue-directory={queue}", f"--remote-ip={BAD_HOST}"]
        subprocess.run([*Mailerq.find(), *pause], check=True, stdout=subprocess.DEVNULL)
    return []


def behind(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """Fresh mail while a backlog waits for one bad peer."""
    backlog, figures = options.backlog, []
    for kind in options.kinds:
        place = directory / kind
        alone = fresh_alone(place / "alone", options)
        copytree(backlog.queue, place / "behind" / "queue")
        why = reasons(place / "behind", kind)
        with (
            Scripted(place / "healthy", "healthy") as healthy,
            peer(place / "bad", kind, [BAD_HOST], backlog.port) as bad,
            relay(place / "behind", healthy, options=why) as system,
        ):
            time.sleep(MEET_SECONDS)
            figures += compare(fresh(system, healthy, options), alone, f"behind {kind}")
            if kind == "paused" and isinstance(bad, Scripted) and bad.connections:
                raise Failed(f"{bad.connections} connections went to a peer that is paused")
        rmtree(place)
    return figures


@dataclass(frozen=True, slots=True)
class Cost:
    """The work of a system so far."""

    cpu: float
    commits: int
    reads: int
    read_bytes: int
    written_bytes: int

    @classmethod
    def of(cls, system: Mailerq) -> Cost:
        assert system.process is not None
        queue = ask(str(system.directory / "queue"), "status")["queue"]
        lines = Path(f"/proc/{system.process.pid}/io").read_text().splitlines()
        io = {key: int(value) for key, value in (line.split(": ") for line in lines)}
        cpu = system.cpu()
        assert cpu is not None
        return cls(cpu, queue["commits"], queue["reads"], io["read_bytes"], io["write_bytes"])


def idle(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """The cost of a backlog that cannot go."""
    backlog = options.backlog
    figures = []
    for kind in ("refusing", "silent"):
        place = directory / kind
        with (
            Scripted(place / "healthy", "healthy") as healthy,
            peer(place / "bad", kind, [BAD_HOST], backlog.port),
            relay(place / "behind", healthy, queue=backlog.queue) as system,
        ):
            time.sleep(MEET_SECONDS)
            first, start = Cost.of(system), time.monotonic()
            time.sleep(options.seconds)
            last, seconds = Cost.of(system), time.monotonic() - start
        percent = 100 * (last.cpu - first.cpu) / seconds
        rest = f"{options.waiting:,} waiting, {seconds:.0f} s"
        what = f"idle, {kind}"
        read, written = (
            (getattr(last, name) - getattr(first, name)) / 1e6
            for name in ("read_bytes", "written_bytes")
        )
        figures += [
            Figure(f"{what}, processor", percent, "% of a core", rest),
            Figure(f"{what}, commits", last.commits - first.commits, "commits"),
            Figure(f"{what}, reads", last.reads - first.reads, "reads"),
            Figure(f"{what}, read", read, "MB"),
            Figure(f"{what}, written", written, "MB"),
        ]
        rmtree(place)
    return figures


def drain(directory: Path, queue: Path, count: int, timeout: float) -> tuple[float, str]:
    """Messages per second from a full queue to a healthy sink, and details."""
    copytree(queue, directory / "system" / "queue")
    with (
        Scripted(directory / "sink", "healthy") as sink,
        Mailerq(directory / "system", sink) as system,
    ):
        deadline = time.monotonic() + timeout
        while sink.mails < count and time.monotonic() < deadline:
            system.check()
            time.sleep(POLL_SECONDS)
        mails, connections = sink.mails, sink.connections
        seconds = (sink.last if mails >= count else time.monotonic()) - sink.first
        if mails < count // 100:
            raise Failed(f"only {mails:,} of {count:,} were delivered\n{system.tail()}")
    rmtree(directory)
    return mails / seconds, f"{mails:,} in {seconds:.0f} s over {connections:,} connections"


def peak(directory: Path, queue: Path, domains: int, timeout: float) -> int:
    """Peak memory of the project in bytes, some time after all domains met a sink that refuses."""
    copytree(queue, directory / "system" / "queue")
    with Refusing() as sink, Mailerq(directory / "system", sink) as system:
        deadline = time.monotonic() + timeout
        while ask(str(system.directory / "queue"), "status")["outgoing"]["destinations"] < domains:
            if time.monotonic() > deadline:
                raise Failed(f"not all of {domains:,} destinations were tried")
            time.sleep(PAUSE_SECONDS)
        time.sleep(2 * MEET_SECONDS)
        assert system.process is not None
        lines = Path(f"/proc/{system.process.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
    rmtree(directory)
    return 1024 * int(line.split()[1])


def many(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """Many destinations against one with the same number of messages."""
    figures = []
    for domains, each, rounds in options.crowds:
        count = domains * each
        for name, modulus in (("many", domains), ("one", 1)):
            fill(directory / name, count, partial(to_domain, domains=modulus))
        rates: dict[str, list[float]] = {"many": [], "one": []}
        for _ in range(rounds):
            for name, found in rates.items():
                limit = options.timeout * max(1, count // 50_000)
                rate, text = drain(directory / "run", directory / name, count, limit)
                progress(f"{domains:,} x {each}, {name}: {rate:,.0f}/s, {text}")
                found.append(rate)
        crowd, one = (statistics.median(found) for found in rates.values())
        what = f"{domains:,} destinations"
        figures.append(
            Figure(f"{what} / one", crowd / one, "x", f"{crowd:,.0f} and {one:,.0f}/s; {each} each")
        )
        half = domains // 2
        fill(directory / "half", count, partial(to_domain, domains=half))
        all_of_them, half_of_them = (
            peak(directory / "run", directory / name, number, 10 * options.timeout)
            for name, number in (("many", domains), ("half", half))
        )
        grown = (all_of_them - half_of_them) / (domains - half) / 1000
        detail = f"peak {all_of_them / 1e6:.1f} MB, and {half_of_them / 1e6:.1f} with half of them"
        figures.append(Figure(f"{what}, memory of one", grown, "KB", detail))
        for name in (*rates, "half"):
            rmtree(directory / name)
    return figures


def greeted(system: Program, clients: int) -> int:
    """How many clients, connecting at once, get the banner 220 in time."""
    deadline = time.monotonic() + BANNER_SECONDS
    count = 0
    with ExitStack() as stack:
        socks = []
        for _ in range(clients):
            with suppress(OSError):
                sock = socket.create_connection((system.host, system.port), _left(deadline))
                socks.append(stack.enter_context(sock))
        for sock in socks:
            with suppress(OSError):
                sock.settimeout(_left(deadline))
                count += sock.recv(100).startswith(b"220")
    return count


def silent(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """Silent hosts must not take places that others need."""
    hosts = [f"127.0.3.{number}" for number in range(1, SILENT_HOSTS + 1)]
    port = reserve(hosts)
    fill(
        directory / "full",
        SILENT_HOSTS * options.each,
        lambda number: to_host(number, hosts[number % SILENT_HOSTS], port),
    )
    alone = fresh_alone(directory / "alone", options)
    with (
        Scripted(directory / "healthy", "healthy") as healthy,
        Scripted(directory / "bad", "silent", addresses=hosts, port=port),
        relay(directory / "behind", healthy, queue=directory / "full") as system,
    ):
        time.sleep(MEET_SECONDS)
        what = f"behind {SILENT_HOSTS} silent"
        refused = NEW_CLIENTS - greeted(system, NEW_CLIENTS)
        text = f"of {NEW_CLIENTS} at once"
        return [
            Figure(f"{what}, refused clients", 100 * refused / NEW_CLIENTS, "%", text),
            *compare(fresh(system, healthy, options), alone, what),
        ]


def closing(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """A peer that closes after each 250: unanswered messages must not lose an attempt."""
    port = reserve([BAD_HOST])
    count = options.closing
    fill(directory / "full", count, lambda number: to_host(number, BAD_HOST, port))
    with (
        Scripted(directory / "healthy", "healthy") as healthy,
        Scripted(directory / "bad", "closing", addresses=[BAD_HOST], port=port) as bad,
        relay(directory / "behind", healthy, queue=directory / "full") as system,
    ):
        start = time.monotonic()
        while True:
            found = ask(str(system.directory / "queue"), "status")["outgoing"]
            done = found["delivered"] + found["failed"] + found["retried"]
            if done >= count or time.monotonic() - start > options.timeout:
                break
            time.sleep(0.05)
        text = f"{found['delivered']:,} delivered of {count:,}, {bad.connections:,} connections"
    lost = 100 * (found["attempts"] - found["delivered"]) / max(found["attempts"], 1)
    return [Figure("closing, results that cost an attempt", lost, "%", text)]


def limited(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """The rate of a destination with a limit, which processes keep together."""
    figures = []
    for processes, text in ((1, "one process"), (2, "two processes")):
        place = directory / str(processes)
        with (
            Scripted(place / "sink", "healthy") as sink,
            Mailerq(
                place / "system",
                sink,
                processes=processes,
                options=with_file(place / "system", "limits-file", LIMITED_DOMAIN),
            ) as system,
        ):
            with ThreadPoolExecutor(CLIENTS) as pool:
                deadline = time.monotonic() + options.timeout
                count = math.ceil(RATE * (options.seconds + options.timeout) / CLIENTS)
                for each in [pool.submit(send, system, count, deadline) for _ in range(CLIENTS)]:
                    each.result()
            first, start = sink.mails, time.monotonic()
            time.sleep(options.seconds)
            mails, seconds = sink.mails - first, time.monotonic() - start
        if mails > RATE * seconds + 1:
            raise Failed(f"{mails} in {seconds:.1f} s is more than the limit of {RATE} a second")
        name = f"limited to {RATE} a second, {text}"
        figures.append(Figure(name, mails / seconds, "/s", f"{mails} in {seconds:.1f} s"))
    return figures


def to_bad_peer(port: int) -> Mail:
    """Mail that Postfix sends to the bad peer by its domain, and the project by its header."""
    recipient = f"RCPT TO:<r@{BAD_DOMAIN}>\r\n".encode()
    header = f"x-mq-smarthost-hostname: {BAD_HOST}\r\nx-mq-smarthost-port: {port}\r\n".encode()
    return (b"MAIL FROM:<c@d.test>\r\n", recipient, b"DATA\r\n"), header + BODY


def postfix(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """Fresh mail behind a backlog that came in by SMTP, through the project and through Postfix."""
    figures = []
    for kind in ("refusing", "silent", "slow", "421"):
        for name in ("mailerq", "Postfix"):
            place = directory / f"{kind}-{name}"
            place.mkdir(parents=True)
            with Scripted(place / "healthy", "healthy") as healthy:
                port = reserve([BAD_HOST])
                system: Program
                if name == "mailerq":
                    system = relay(place / "system", healthy, options=["--smtp-extract=all"])
                else:
                    route = f"inline:{{{{{BAD_DOMAIN} = smtp:[{BAD_HOST}]:{port}}}}}"
                    system = Postfix(place / "system", healthy, options={"transport_maps": route})
                with peer(place / "bad", kind, [BAD_HOST], port), system:
                    alone = fresh(system, healthy, options)
                    deadline = time.monotonic() + 10 * options.timeout
                    with ThreadPoolExecutor(CLIENTS) as pool:
                        each, mail = options.backlog_postfix // CLIENTS, to_bad_peer(port)
                        for sent in [
                            pool.submit(send, system, each, deadline, mail) for _ in range(CLIENTS)
                        ]:
                            sent.result()
                    time.sleep(MEET_SECONDS)
                    what = f"{name} behind {kind}"
                    figures += compare(fresh(system, healthy, options), alone, what)
            rmtree(place)
    return figures


SCENARIOS: Final[dict[str, Callable[[argparse.Namespace, Path], list[Figure]]]] = {
    made.__name__: made for made in (behind, idle, many, silent, closing, limited, postfix)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="whether mail that waits costs other mail")
    parser.add_argument("--full", action="store_true",
                        help=f"{FULL:,} waiting, 50,000 destinations as well")  # fmt: skip
    parser.add_argument("--only", default=",".join(SCENARIOS), help="which (%(default)s)")
    parser.add_argument("--kinds", default="refusing,silent,slow,421,limited,paused,probed",
                        help="peers of 'behind' (%(default)s)")  # fmt: skip
    parser.add_argument("--waiting", type=int, help="messages (100000)")
    parser.add_argument("--each", type=int, default=1000, help="for a silent host (%(default)s)")
    parser.add_argument("--backlog-postfix", type=int, default=10_000, metavar="NUMBER",
                        help="messages waiting in 'postfix' (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--closing", type=int, default=2000, help="for the closing peer (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=30.0,
                        help="of 'idle', for each of two peers (%(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="of fresh mail (%(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=20.0,
        help="seconds until fresh mail is given up (%(default)s)",
    )
    parser.add_argument("--directory", help="where the queues go (a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    options.waiting = options.waiting or (FULL if options.full else 100_000)
    options.kinds = options.kinds.split(",")
    options.crowds = [(5000, 10, options.rounds if options.full else 1)]
    if options.full:
        options.crowds.append((50_000, 4, 1))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="flows-", dir=options.directory) as root:
        Path(root).chmod(0o755)  # Postfix runs as another user
        options.backlog = Backlog(Path(root), options.waiting)
        for name in options.only.split(","):
            if name not in SCENARIOS:
                parser.error(f"--only: there is no {name!r}, only {', '.join(SCENARIOS)}")
            start = time.monotonic()
            try:
                figures += SCENARIOS[name](options, Path(root, name))
            except Unavailable as error:
                progress(f"{name} is left out: {error}")
            progress(f"{name}: {time.monotonic() - start:.0f} s")
            rmtree(Path(root, name), ignore_errors=True)
    print_document(figures, as_json=options.json, machine=machine(), waiting=options.waiting)


if __name__ == "__main__":
    main()
