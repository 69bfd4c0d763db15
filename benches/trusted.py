"""Measure mail that is trusted: TLS in and out, and a DKIM signature, beside Postfix with opendkim.

    python benches/trusted.py [--messages N] [--rounds N] [--systems …]

Mails of 20 KiB come in by STARTTLS over 20 sessions, get one RSA-2048 signature each, and go out by
STARTTLS to one sink; otherwise as relay.py does it. "mailerq" has a process for each core,
"mailerq-1" a single one, "mailerq-1 unsigned" is a single process that signs nothing: the
difference in processor time is the cost of a signature. Every mail in the sink of the others must
have a signature, and the sink takes nothing in clear.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from figures import Figure, print_document, progress
from peers import (
    LOOPBACK,
    Destination,
    Failed,
    Mailerq,
    Postfix,
    System,
    Unavailable,
    cpu_seconds,
    file_system,
    find_program,
    free_port,
    machine,
)
from relay import Load, compare, describe, measure, summarise
from tls_peers import SecureSink

HERE: Final = Path(__file__).resolve().parent
UNSIGNED: Final = "mailerq-1 unsigned"
SYSTEMS: Final = ("mailerq", "mailerq-1", UNSIGNED, "postfix")
DOMAIN: Final = "d.test"
SELECTOR: Final = "bench"
WARM_UP: Final = 2000


class PostfixSigning(Postfix):
    """Postfix with TLS both ways, and opendkim as its milter; its processor time includes both."""

    def __init__(self, directory: Path, sink: Destination, certificate: Path, key: Path) -> None:
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

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
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
        try:
            return super().__enter__()
        except BaseException:
            self._stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stop()

    def _stop(self) -> None:
        self.milter.kill()
        self.milter.wait()

    def check(self) -> None:
        if self.milter.poll() is not None:
            raise Failed(f"opendkim has ended with status {self.milter.returncode}")
        super().check()

    def cpu(self) -> float | None:
        postfix = super().cpu()
        return None if postfix is None else postfix + cpu_seconds(self.milter.pid)


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
    options = [f"--smtp-certificate={certificate}", "--connection-secure=required"]
    if name != UNSIGNED:
        options.append(f"--dkim-directory={keys}")
    processes = 2 if name == "mailerq" else 1
    return Mailerq(directory, sink, name=name, processes=processes, options=options)


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
            systems, load, rounds=options.rounds, ways=(False, True), warm_up=WARM_UP, source=client
        )
        for system, sink in systems:
            if sink.unsigned != (sink.count() if system.name == UNSIGNED else 0):
                raise Failed(f"{system.name}: {sink.unsigned} of {sink.count()} without signature")
    rows = summarise(runs)
    figures = compare(rows, "postfix")
    found = {(row["system"], row["kept"]): row["cpu"] for row in rows}
    for kept, way in ((False, "new"), (True, "kept")):
        signed, plain = found.get(("mailerq-1", kept)), found.get((UNSIGNED, kept))
        if signed is not None and plain is not None:
            detail = f"{signed:.2f} and {plain:.2f}"
            figures.append(Figure(f"cost of a signature, {way}", signed - plain, "ms", detail))
    return figures, describe(rows, figures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="mail over TLS with a signature")
    add = parser.add_argument
    add("-n", "--messages", type=int, default=1500, help="messages in a run (%(default)s)")
    add("--sessions", type=int, default=20, help="sessions at a time (%(default)s)")
    add("--size", type=int, default=20 * 1024, help="bytes of a body (%(default)s)")
    add("--rounds", type=int, default=3, help="runs of each system and way (%(default)s)")
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
