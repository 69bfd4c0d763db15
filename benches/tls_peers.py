"""A client and a server that speak SMTP over STARTTLS, for trusted.py.

    python benches/tls_peers.py source HOST:PORT MESSAGES SESSIONS BYTES new|kept
    python benches/tls_peers.py sink COUNTERS HOST:PORT CERTIFICATE

smtp-source and smtp-sink have no TLS. Both programs here use blocking sockets in threads, which
costs the least processor time that Python can do with. The client sends an envelope in one write
and the mail in another. The server takes mail only inside TLS, counts it in the file COUNTERS, and
counts apart what has no DKIM-Signature field.
"""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from peers import START_SECONDS, Failed, Program, free_port

from mailerq.address import split_host_port

__all__ = ["SecureSink"]

MAILS, UNSIGNED, READY = range(3)
COUNTERS_BYTES: Final = 3 * 8
BACKLOG: Final = 1000
READ_BYTES: Final = 1 << 16
LINE: Final = b"x" * 70 + b"\r\n"
HEADER: Final = (
    b"From: News <c@d.test>\r\nTo: a@b.test\r\nSubject: a mail of the benchmark\r\n"
    b"Date: Thu, 26 Nov 2026 12:00:00 +0000\r\nMessage-ID: <%d.%d@d.test>\r\n"
    b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n"
)


class Lines:
    """Replies or commands from a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""

    def line(self) -> bytes:
        while b"\n" not in self.buffer:
            self._more()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def until(self, end: bytes) -> bytes:
        """All up to an end; the peer may go on behind it with its next commands."""
        start = 0
        while (place := self.buffer.find(end, start)) < 0:
            start = max(0, len(self.buffer) - len(end) + 1)
            self._more()
        place += len(end)
        found, self.buffer = self.buffer[:place], self.buffer[place:]
        return found

    def reply(self) -> int:
        while (line := self.line())[3:4] == b"-":
            pass
        return int(line[:3])

    def _more(self) -> None:
        data = self.sock.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the peer has closed")
        self.buffer += data


# -- the client ------------------------------------------------------------------------------


def expect(lines: Lines, *codes: int) -> None:
    for code in codes:
        if (found := lines.reply()) != code:
            raise ConnectionError(f"{found} instead of {code}")


def connect(host: str, port: int, context: ssl.SSLContext) -> Lines:
    sock = socket.create_connection((host, port), 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = Lines(sock)
    expect(lines, 220)
    for command, code in ((b"EHLO client.test\r\n", 250), (b"STARTTLS\r\n", 220)):
        sock.sendall(command)
        expect(lines, code)
    lines = Lines(context.wrap_socket(sock))
    lines.sock.sendall(b"EHLO client.test\r\n")
    expect(lines, 250)
    return lines


def send(lines: Lines, mail: bytes) -> None:
    lines.sock.sendall(b"MAIL FROM:<c@d.test>\r\nRCPT TO:<a@b.test>\r\nDATA\r\n")
    expect(lines, 250, 250, 354)
    lines.sock.sendall(mail)
    expect(lines, 250)


def source(place: str, messages: int, sessions: int, size: int, *, kept: bool) -> None:
    host, port = split_host_port(place)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    numbers, problems = iter(range(messages)), []
    body = LINE * (size // len(LINE)) + b".\r\n"
    lock = threading.Lock()

    def take() -> Iterator[int]:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            yield number

    def run() -> None:
        try:
            left = take()
            while (number := next(left, None)) is not None:
                lines = connect(host, port, context)
                send(lines, HEADER % (os.getpid(), number) + body)
                for further in left if kept else islice(left, 0):
                    send(lines, HEADER % (os.getpid(), further) + body)
                lines.sock.sendall(b"QUIT\r\n")
                expect(lines, 221)
                lines.sock.close()
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        sys.exit(f"{len(problems)} of {sessions} sessions failed, the first: {problems[0]!r}")


# -- the server ------------------------------------------------------------------------------


def serve(path: str, place: str, certificate: str) -> None:
    with open(path, "r+b") as file:
        counters = memoryview(mmap.mmap(file.fileno(), COUNTERS_BYTES)).cast("d")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    lock = threading.Lock()

    def session(sock: socket.socket) -> None:
        lines = Lines(sock)
        sock.sendall(b"220 sink.test ESMTP\r\n")
        secure = False
        while True:
            verb = lines.line()[:4].upper()
            if verb == b"STAR" and not secure:
                sock.sendall(b"220 2.0.0 go on\r\n")
                sock = context.wrap_socket(sock, server_side=True)
                lines, secure = Lines(sock), True
                continue
            replies = [answer(verb, secure)]
            while verb not in (b"DATA", b"QUIT") and b"\n" in lines.buffer:
                verb = lines.line()[:4].upper()
                replies.append(answer(verb, secure))
            sock.sendall(b"".join(replies))
            if verb == b"QUIT":
                return
            if verb == b"DATA" and secure:
                mail = lines.until(b"\r\n.\r\n")
                signed = mail.find(b"\nDKIM-Signature:", 0, 8192) >= 0 or mail[:5] == b"DKIM-"
                with lock:
                    counters[MAILS] += 1
                    counters[UNSIGNED] += not signed
                sock.sendall(b"250 2.0.0 taken\r\n")

    def guarded(sock: socket.socket) -> None:
        try:
            session(sock)
        except OSError as error:  # ssl.SSLError is one
            print(f"a connection ended: {error!r}", file=sys.stderr)
        finally:
            sock.close()

    host, port = split_host_port(place)
    with socket.create_server((host, port), backlog=BACKLOG) as listener:
        counters[READY] = 1.0
        while True:
            sock = listener.accept()[0]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=guarded, args=(sock,), daemon=True).start()


def answer(verb: bytes, secure: bool) -> bytes:
    if verb == b"EHLO":
        more = b"" if secure else b"250-STARTTLS\r\n"
        return b"250-sink.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n" + more + b"250 SIZE\r\n"
    if verb == b"QUIT":
        return b"221 2.0.0 bye\r\n"
    if not secure:
        return b"530 5.7.0 STARTTLS first\r\n"
    return b"354 go on\r\n" if verb == b"DATA" else b"250 2.0.0 fine\r\n"


class SecureSink(Program):
    """The server, in a process of its own."""

    name = "the sink"

    def __init__(self, directory: Path, certificate: Path) -> None:
        super().__init__(directory)
        self.certificate = certificate
        self.port = free_port()

    def prepare(self) -> list[str]:
        path = self.directory / "counters"
        path.write_bytes(bytes(COUNTERS_BYTES))
        with open(path, "r+b") as file:
            self._counters = memoryview(mmap.mmap(file.fileno(), COUNTERS_BYTES)).cast("d")
        return [sys.executable, __file__, "sink", str(path), self.address, str(self.certificate)]

    def _wait_for_banner(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._counters[READY]:
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} does not start\n{self.tail()}")
            time.sleep(0.01)

    def count(self) -> int:
        """Mails that have arrived since the start."""
        return int(self._counters[MAILS])

    @property
    def unsigned(self) -> int:
        """Those of them without a signature."""
        return int(self._counters[UNSIGNED])

    def waiting(self) -> int:
        return 0


def main() -> None:
    kind, *arguments = sys.argv[1:]
    if kind == "sink":
        serve(*arguments)
    else:
        place, messages, sessions, size, way = arguments
        source(place, int(messages), int(sessions), int(size), kept=way == "kept")


if __name__ == "__main__":
    main()
