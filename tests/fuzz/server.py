"""A fuzz target for the server machine: whatever comes in, what goes out is SMTP.

    python tests/fuzz/server.py [--seconds N]

runs atheris (libFuzzer) for a bounded time from the seeds in tests/fuzz/corpus, and leaves what it
found beside them in .fuzz. The tests run `check` over the seeds, without atheris.

The first byte of an input says what the server offers, the second how large the reads are; the
rest is what the client sends.
"""

from __future__ import annotations

import argparse
import atexit
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CORPUS = Path(__file__).resolve().parent / "corpus"
FOUND = ROOT / ".fuzz"

WELL_FORMED = re.compile(rb"(?:[2-5]\d\d[ -][^\x00-\x1f\x7f]*\r\n)*").fullmatch
READS = (1, 2, 3, 7, 64, 1000, 65536)


def check(data: bytes) -> None:
    """One session. Raises AssertionError, or what a defect raises."""
    from mailerq.wire import framing, server
    from mailerq.wire.smtp import Reply

    if len(data) < 2:
        return
    flags, read = data[0], READS[data[1] % len(READS)]
    framing.BLOCK_BYTES = 16 if flags & 64 else 1 << 18
    machine = server.ServerProtocol(
        server.Settings(
            hostname="mx.test",
            max_size=2000,
            max_recipients=3,
            starttls=bool(flags & 1),
            mechanisms=("PLAIN", "LOGIN", "CRAM-MD5") if flags & 2 else (),
            lmtp=bool(flags & 4),
            normalize=bool(flags & 8),
        ),
        auth_in_clear=bool(flags & 16),
        xclient=bool(flags & 32),
    )
    machine.refusals = []
    machine.greet()
    out, answers = machine.data_to_send(), data[1]
    stream = data[2:]
    for start in range(0, len(stream) + 1, read):
        machine.receive_data(stream[start : start + read])
        while not isinstance(event := machine.next_event(), server.NoEvent):
            if isinstance(event, server.Closing):
                assert WELL_FORMED(out + machine.data_to_send())
                return
            if isinstance(event, server.Content):
                binary = machine.mail is not None and machine.mail.parameters.body == "BINARYMIME"
                assert binary or not framing.has_bare_newline(bytes(event.body))
                assert len(event.body) <= 2 * 2000
            answers = answers * 5 % 251
            if answers % 7 == 0 and not isinstance(event, server.StartTls):
                machine.reject(Reply(451, "4.7.1 later"))
            else:
                machine.accept()
            if machine.state is server.State.TLS:
                machine.tls_started()
        assert sum(map(len, machine._body._pieces)) <= 2000
    out += machine.data_to_send()
    assert WELL_FORMED(out), out
    for command, reply in machine.refusals:
        assert reply.code >= 400 and "\n" not in command.removesuffix("\n"), command
    machine.receive_data(b"")
    assert machine.next_event() is server.CLOSED


def main() -> int:
    """Fuzz for some seconds; 0 also where atheris cannot be had."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        print("atheris is not installed here (it has wheels for some Pythons only): nothing done")
        return 0
    # It sees into Python only, not into what was compiled from it.
    sources = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, sources)
    shutil.copytree(ROOT / "mailerq", sources / "mailerq", ignore=shutil.ignore_patterns("*.so"))
    sys.path.insert(0, str(sources))
    with atheris.instrument_imports(include=["mailerq.wire", "mailerq.address"]):
        import mailerq.wire.server  # noqa: F401
    FOUND.mkdir(exist_ok=True)
    arguments = [f"-max_total_time={options.seconds}", "-max_len=4096", "-timeout=10"]
    places = [f"-artifact_prefix={FOUND}/", str(FOUND), str(CORPUS)]
    atheris.Setup([sys.argv[0], *arguments, *places], check)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
