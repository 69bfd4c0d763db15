"""A peer that writes its session tickets itself: OpenSSL makes none that are wrong or large."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio
import trustme

from tests.outbound.kit import PeerConnection
from tests.support import DEADLINE

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of asyncore, which nobody uses here
    from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
    from tlslite.messages import ContentType, Message, NewSessionTicket


def ticket(size: int = 200, *, lifetime: int = 7200, nonce: bytes = b"\0") -> bytes:
    """A message of TLS 1.3 with a ticket that means nothing."""
    made = NewSessionTicket().create(lifetime, 1, bytearray(nonce), bytearray(size), [])
    return bytes(made.write())


class Crafted(trio.abc.Stream):
    """The TLS of a peer, which runs in threads."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.to_thread.run_sync(self.connection.write, bytearray(data))

    async def send_messages(self, messages: Sequence[bytes]) -> None:
        """Send messages of the handshake as they are."""

        def send() -> None:
            for message in messages:
                for _ in self.connection._sendMsg(
                    Message(ContentType.handshake, bytearray(message))
                ):
                    raise AssertionError("the socket waits by itself")

        await trio.to_thread.run_sync(send)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await trio.to_thread.run_sync(self.connection.read, max_bytes or 4096, 1))

    async def aclose(self) -> None:
        self.connection.sock.close()
        await trio.lowlevel.checkpoint()


@dataclass
class TicketPeer:
    """A peer that sends `messages` behind the handshake; `script` plays it."""

    authority: trustme.CA
    name: str
    messages: Sequence[bytes] = ()
    handshakes: int = 0

    async def script(self, peer: PeerConnection) -> None:
        await peer.send("220 mx.test ESMTP\r\n")
        await peer.line()
        await peer.send("250-mx.test\r\n250 STARTTLS\r\n")
        await peer.line()
        await peer.send("220 go\r\n")
        assert isinstance(peer.stream, trio.SocketStream)
        with socket.socket(fileno=socket.dup(peer.stream.socket.fileno())) as own:
            own.settimeout(DEADLINE)
            peer.stream = stream = Crafted(TLSConnection(own))
            await trio.to_thread.run_sync(self._shake_hands, stream.connection)
            self.handshakes += 1
            try:
                await stream.send_messages(self.messages)
                await peer.line()
                await peer.send("250-mx.test\r\n250 PIPELINING\r\n")
                await peer.talk()
            except Exception as error:  # the library has many errors for a client that leaves
                peer.peer.commands.append(f"({type(error).__name__})")

    def _shake_hands(self, connection: Any) -> None:
        issued = self.authority.issue_cert(self.name, key_type=trustme.KeyType.RSA)
        chain = X509CertChain()
        chain.parsePemList("".join(pem.bytes().decode() for pem in issued.cert_chain_pems))
        key = parsePEMKey(issued.private_key_pem.bytes().decode(), private=True)
        settings = HandshakeSettings()
        settings.ticketKeys = []  # the tickets of the test are all there are
        connection.handshakeServer(certChain=chain, privateKey=key, settings=settings)
