"""Measure mail that is trusted: TLS in and out, and a DKIM signature, beside Postfix with opendkim.

    python benches/trusted.py [--messages N] [--rounds N] [--systems …] [--pairs N]

Mails of 20 KiB come in by STARTTLS over 20 sessions, get one RSA-2048 signature each, and go out by
STARTTLS to one sink; otherwise as relay.py does it. "mailerq" has a process for each core,
"mailerq-1" a single one. Every mail in the sink must have a signature, and the sink takes nothing
in clear.

Then "mailerq-1" relays `--pairs` short runs with `dkim-directory` and as many without, by turns,
with a reload between them. The median of the differences in processor time is the cost of a
signature: the two runs of a pair share a process, its caches, and the other load of that second.
Meanwhile the server has a core of its own: where client, sink and server move about on two cores,
a message without a signature costs a third more, by caches that have to be filled again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from figures import Figure, print_document, progress
from peers import (
    LOOPBACK,
    Destination,
    Failed,
    Mailerq,
    Postfix,
    Program,
    System,
    Unavailable,
    cpu_seconds,
    file_system,
    find_program,
    free_port,
    machine,
)
from relay import Load, compare, describe, measure, relay, summarise
from tls_peers import SecureSink

HERE: Final = Path(__file__).resolve().parent
SYSTEMS: Final = ("mailerq", "mailerq-1", "postfix")
DOMAIN: Final = "d.test"
SELECTOR: Final = "bench"
WARM_UP: Final = 2000
WAYS: Final = (False, True)

PAIR_MESSAGES: Final = 300
"""Messages in each run of a pair, which take about half a second."""


class MailerqSigning(Mailerq):
    """The project with TLS both ways, and a signing key that a reload takes away or gives back."""

    def __init__(
        self, directory: Path, sink: Destination, *, name: str, certificate: Path, keys: Path
    ) -> None:
        super().__init__(
            directory,
            sink,
            name=name,
            processes=2 if name == "mailerq" else 1,
            options=[f"--smtp-certificate={certificate}", "--connection-secure=required"],
        )
        self.keys = keys

    def prepare(self) -> list[str]:
        command = super().prepare()
        self.settings = (self.directory / "config.txt").read_text()
        self._write(signing=True)
        return command

    def _write(self, *, signing: bool) -> None:
        more = f"dkim-directory: {self.keys}\n" if signing else ""
        (self.directory / "config.txt").write_text(self.settings + more)

    def reload(self, *, signing: bool) -> None:
        self._write(signing=signing)
        command = [*self.command, "reload", f"--config-file={self.directory / 'config.txt'}"]
        done = subprocess.run(command, cwd=self.cwd(), capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{self.name} does not reload: {done.stderr.strip()}")


class PostfixSigning(Postfix):
    """Postfix with TLS both ways, and opendkim as its milter; its processor time includes both."""

    def __init__(self, directory: Path, sink: Destination, certificate: Path, key: Path) -> None:
        self.milter: subprocess.Popen[bytes] | None = None
        self.milter_port = free_port()
        self.key = key
        super().__init__(
            directory,
            sink,
            options={
                "smtpd_tls_security_level": "may",
                "smtpd_tls_chain_files": str(certificate),
                "smtp_tls_security_level": "encrypt",
                "smtp_tls_session_cache_database": f"btree:{directory}/data/smtp_cache",
                "smtp_tls_connection_reuse": "yes",
                "tls_random_source": "dev:/dev/urandom",
                "smtpd_milters": f"inet:{LOOPBACK}:{self.milter_port}",
                "milter_default_action": "tempfail",
            },
            services=[
                ("tlsmgr", "unix", "-", "1000?", "1", "tlsmgr"),
                ("tlsproxy", "unix", "-", "-", "0", "tlsproxy"),
            ],
        )

    def prepare(self) -> list[str]:
        settings = {
            "Background": "no",
            "Mode": "s",
            "Domain": DOMAIN,
            "Selector": SELECTOR,
            "KeyFile": str(self.key),
            "Canonicalization": "relaxed/simple",
            "OversignHeaders": "From",
            "RequireSafeKeys": "no",  # the temporary directory is below one that anybody may write
            "Socket": f"inet:{self.milter_port}@{LOOPBACK}",
            "PidFile": str(self.directory / "opendkim.pid"),
        }
        path = self.directory / "opendkim.conf"
        path.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        command = [find_program("opendkim", "opendkim"), "-f", "-x", str(path)]
        self.milter = subprocess.Popen(command)
        return super().prepare()

    def stop_others(self) -> None:
        milter, self.milter = self.milter, None
        if milter is not None:
            milter.kill()
            milter.wait()

    def check(self) -> None:
        if self.milter is not None and self.milter.poll() is not None:
            raise Failed(f"opendkim has ended with status {self.milter.returncode}")
        super().check()

    def cpu(self) -> float | None:
        postfix = super().cpu()
        if postfix is None or self.milter is None:
            return None
        return postfix + cpu_seconds(self.milter.pid)


def client(system: System, load: Load, kept: bool) -> list[str]:
    """The command of the client."""
    command = [sys.executable, str(HERE / "tls_peers.py"), "source", system.address]
    numbers = map(str, (load.messages, load.sessions, load.size))
    return [*command, *numbers, "kept" if kept else "new"]


def make_keys(directory: Path) -> tuple[Path, Path]:
    """A certificate with its key, and the directory of the signing key."""
    certificate = directory / "certificate.pem"
    made = trustme.CA().issue_cert("relay.test", "sink.test", LOOPBACK)
    made.private_key_and_cert_chain_pem.write_to_path(str(certificate))
    keys = directory / "keys"
    (keys / DOMAIN).mkdir(parents=True)
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = keys / DOMAIN / f"{SELECTOR}.pem"
    path.write_bytes(pem)
    path.chmod(0o600)
    return certificate, keys


def start(name: str, directory: Path, sink: SecureSink, certificate: Path, keys: Path) -> System:
    if name == "postfix":
        key = keys / DOMAIN / f"{SELECTOR}.pem"
        return PostfixSigning(directory, sink, certificate, key)
    return MailerqSigning(directory, sink, name=name, certificate=certificate, keys=keys)


def cost(system: MailerqSigning, sink: SecureSink, load: Load, pairs: int, *, kept: bool) -> Figure:
    """The processor time of a signature, by runs with it and without in turns: first, last."""
    load = replace(load, messages=PAIR_MESSAGES)
    way = "kept" if kept else "new"
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(pairs):
        for signing in (True, False) if number % 2 else (False, True):
            system.reload(signing=signing)
            before, unsigned = sink.count(), sink.unsigned
            run = relay(system, sink, load, kept=kept, source=client)
            check_signatures(system, sink.count() - before, sink.unsigned - unsigned, signing)
            assert run.cpu is not None
            found[signing].append(run.cpu)
        signed, plain = found[True][-1], found[False][-1]
        progress(f"{way} connections, pair {number + 1} of {pairs}: {signed:.2f} and {plain:.2f}")
    costs = [signed - plain for signed, plain in zip(found[True], found[False], strict=True)]
    low, _, high = statistics.quantiles(costs, n=4)
    detail = f"half of {pairs} pairs from {low:.2f} to {high:.2f}, "
    detail += f"{statistics.median(found[True]):.2f} and {statistics.median(found[False]):.2f}"
    return Figure(f"cost of a signature, {way}", statistics.median(costs), "ms", detail)


@contextmanager
def core_of_its_own(system: Program, *peers: Program) -> Iterator[None]:
    """Keep a system on one core, and its peers and this program, with its children, on the others.

    Does nothing on a single core.
    """
    cores = os.sched_getaffinity(0)
    first = {min(cores)}
    others = cores - first
    if not others:
        yield
        return

    def keep(program: Program, allowed: set[int]) -> None:
        assert program.process is not None
        for task in Path(f"/proc/{program.process.pid}/task").iterdir():
            with suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(int(task.name), allowed)

    keep(system, first)
    for peer in peers:
        keep(peer, others)
    os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def check_signatures(system: System, count: int, unsigned: int, signing: bool) -> None:
    if unsigned != (0 if signing else count):
        raise Failed(f"{system.name}: {unsigned} of {count} mails came without a signature")


def rsa_alone() -> Figure:
    """The processor time of OpenSSL's RSA-2048, with all that it needs in the caches."""
    key = rsa.generate_private_key(65537, 2048)
    times = []
    for _ in range(10):
        began = time.process_time()
        for _ in range(100):
            key.sign(b"text", padding.PKCS1v15(), hashes.SHA256())
        times.append(10 * (time.process_time() - began))
    return Figure("RSA alone", statistics.median(times), "ms", "")


def run(options: argparse.Namespace, directory: Path) -> tuple[list[Figure], str]:
    certificate, keys = make_keys(directory)
    load = Load(options.messages, options.sessions, options.size, options.timeout)
    with ExitStack() as stack:
        systems: list[tuple[System, SecureSink]] = []
        for name in options.systems.split(","):
            sink = stack.enter_context(SecureSink(directory / f"{name}-sink", certificate))
            try:
                system = start(name, directory / name, sink, certificate, keys)
                systems.append((stack.enter_context(system), sink))
            except Unavailable as reason:
                progress(f"{name} is left out: {reason}")
        runs = measure(
            systems, load, rounds=options.rounds, ways=WAYS, warm_up=WARM_UP, source=client
        )
        rows = summarise(runs)
        figures = compare(rows, "postfix")
        for system, sink in systems:
            check_signatures(system, sink.count(), sink.unsigned, signing=True)
            if system.name == "mailerq-1" and options.pairs:
                assert isinstance(system, MailerqSigning)
                with core_of_its_own(system, sink):
                    figures += [cost(system, sink, load, options.pairs, kept=kept) for kept in WAYS]
                figures.append(rsa_alone())
    return figures, describe(rows, figures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="mail over TLS with a signature")
    add = parser.add_argument
    add("-n", "--messages", type=int, default=1500, help="messages in a run (%(default)s)")
    add("--sessions", type=int, default=20, help="sessions at a time (%(default)s)")
    add("--size", type=int, default=20 * 1024, help="bytes of a body (%(default)s)")
    add("--rounds", type=int, default=3, help="runs of each system and way (%(default)s)")
    add("--pairs", type=int, default=30, help="pairs of runs for a signature (%(default)s)")
    add("--systems", default=",".join(SYSTEMS), help="what to start (%(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds for one run (%(default)s)")
    add("--directory", help="where the queues go (a temporary directory)")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if unknown := set(options.systems.split(",")) - set(SYSTEMS):
        parser.error(f"--systems: there is no {unknown.pop()!r}, only {', '.join(SYSTEMS)}")
    root = Path(tempfile.mkdtemp(prefix="trusted-", dir=options.directory))
    root.chmod(0o755)  # Postfix runs as another user
    try:
        figures, text = run(options, root)
        on = file_system(root)
    except Failed as reason:
        sys.exit(str(reason))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if options.json:
        print_document(figures, as_json=True, machine=machine() | {"file_system": on})
    else:
        print(f"{options.messages} messages of {options.size} bytes, on {on}\n\n{text}")


if __name__ == "__main__":
    main()
