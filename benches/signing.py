"""Measure the processor time of signatures: `python benches/signing.py`.

A mail of 20 KiB, with a header of 20 fields. "in all" is what a message costs more with a key than
without one: reading its header, hashing its body, finding the key, and the signature. Times are
processor time of the process, the best of some rounds: other load disturbs the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mailerq.config import Config
from mailerq.live import Live
from mailerq.mail._canonical import Body
from mailerq.message import Message
from mailerq.outbound.signer import Signer
from mailerq.outbound.signing import Signing
from mailerq.store.signing_keys import SigningKey

MB = 1 << 20
MUST_MS, GOAL_MS = 0.4, 0.3


class Nothing:
    def update(self, block: memoryview) -> None:
        pass


class Job:
    """What `Signing` asks of a job."""

    def __init__(self, mail: bytes) -> None:
        self.message = Message({}, mail)
        self.unmade = mail
        self.made = None


def mail_of(size: int, number: int = 0) -> bytes:
    head = b"From: Ann <ann@example.com>\r\nTo: bob@example.org\r\nSubject: a mail\r\n"
    head += b"Date: Thu, 26 Nov 2026 12:00:00 +0000\r\nMessage-ID: <%d@example.com>\r\n" % number
    head += b"MIME-Version: 1.0\r\nContent-Type: text/html; charset=utf-8\r\n"
    head += b"".join(b"X-Field-%d: a value of some length, as usual\r\n" % n for n in range(13))
    line = b'  <td class="text">The quick brown fox jumps over the lazy dog</td>\r\n'
    body = line * ((size - len(head)) // len(line))
    return head + b"\r\n" + body


def best(work: Callable[[], object], count: int, rounds: int) -> float:
    """Seconds of processor time of one call."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(count):
            work()
        times.append((time.process_time() - began) / count)
    return min(times)


async def best_of_tasks(work: Callable[[], Awaitable[object]], count: int, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(count):
            await work()
        times.append((time.process_time() - began) / count)
    return min(times)


async def signed(keys: dict[str, bytes], *, shared: bool, threads: bool, rounds: int) -> float:
    """Seconds of processor time of one mail with these keys."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory, "example.com")
        folder.mkdir()
        for selector, pem in keys.items():
            path = folder / f"{selector}.pem"
            path.write_bytes(pem)
            path.chmod(0o600)
        signer = Signer(Live(Config(dkim_directory=directory)))
        await signer.find("example.com")
        if not threads:
            signer._signatures._spent = float("-inf")  # always at once
        mails = [mail_of(20 << 10, 0 if shared else number) for number in range(200)]
        state = {"at": 0}

        async def one() -> None:
            if not threads:
                signer._signatures._began = float("inf")
            mail = mails[state["at"] % len(mails)]
            state["at"] += 1
            job: Any = Job(mail)
            signing = Signing(signer)
            if not signing.prepare_now(job, mail):
                await signing.prepare(job, mail)
            sent = await signing.sign(job, mail, mail, False, None)
            assert len(sent) > len(mail)  # type: ignore[arg-type]

        if not threads:
            return await best_of_tasks(one, 200, rounds)
        signer._signatures._spent, signer._signatures._began = float("inf"), float("inf")
        began = time.process_time()
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(one)
        return (time.process_time() - began) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds

    def pem(key: Any) -> bytes:
        made: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return made

    two = {
        "rsa": pem(rsa.generate_private_key(65537, 2048)),
        "ed25519": pem(ed25519.Ed25519PrivateKey.generate()),
    }
    for name, each in two.items():
        key = SigningKey(each)
        print(f"{name:8} alone              {best(lambda k=key: k.sign(bytes(1500)), 100, rounds) * 1e3:7.3f} ms")  # fmt: skip # noqa: E501
    for label, keys, shared in (
        ("rsa, in all", ["rsa"], False),
        ("rsa, one of many recipients", ["rsa"], True),
        ("ed25519, in all", ["ed25519"], False),
        ("both, in all", ["rsa", "ed25519"], False),
    ):
        chosen = {name: two[name] for name in keys}
        seconds = trio.run(
            lambda c=chosen, s=shared: signed(c, shared=s, threads=False, rounds=rounds)
        )
        verdict = ""
        if label == "rsa, in all":
            verdict = "goal" if seconds * 1e3 <= GOAL_MS else "met"
            verdict = verdict if seconds * 1e3 <= MUST_MS else "MISSED"
            verdict = f"  must {MUST_MS}, goal {GOAL_MS}: {verdict}"
        print(f"{label:28}{seconds * 1e3:7.3f} ms{verdict}")
    seconds = trio.run(
        lambda: signed({"rsa": two["rsa"]}, shared=False, threads=True, rounds=rounds)
    )
    print(f"{'rsa, 1,000 at once, a thread':28}{seconds * 1e3:7.3f} ms")
    bodies = {
        "text": b"The quick brown fox jumps over the lazy dog, again and again.\r\n",
        "html": b'      <td class="a">The quick brown fox</td>\r\n',
        "base64": b"QUJD" * 19 + b"\r\n",
    }
    for name, line in bodies.items():
        body = (line * (MB // len(line) + 1))[:MB]
        for relaxed in (False, True):

            def run(sink: Any, body: bytes = body, relaxed: bool = relaxed) -> None:
                canonical = Body(sink, relaxed=relaxed)
                canonical.add(body)
                canonical.end()

            form = "relaxed" if relaxed else "simple"
            alone = best(lambda r=run: r(Nothing()), 10, rounds)
            both = best(lambda r=run: r(hashlib.sha256()), 10, rounds)
            print(
                f"{name:7} {form:8} {alone * 1e3:6.2f} ms/MB, with SHA-256 {both * 1e3:6.2f} ms/MB"
            )


if __name__ == "__main__":
    main()
