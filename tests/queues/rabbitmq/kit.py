"""A real RabbitMQ for tests: on its own ports, in its own directory, with its own name server.

Control goes through ``erl_call``, which takes some milliseconds; ``rabbitmqctl`` would take
seconds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pika
import pytest
import trio

from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import Channel, connect
from tests.support import hold_ports

__all__ = ["Broker", "channel_to", "running_broker", "running_cluster", "send"]

START_SECONDS = 60.0
SERVERS = "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server"
USER, PASSWORD = "mailerq", "sesame"

ONE_SCHEDULER = "+S 1:1 +sbwt none +sbwtdcpu none"
"""One scheduler that does not spin: tests of others run on this host."""


def _server() -> Path:
    found = sorted(Path("/").glob(SERVERS.lstrip("/")))
    if not found:
        pytest.skip("there is no rabbitmq-server, the Debian package")
    for program in ("epmd", "erl_call"):
        if _program(program) is None:
            pytest.skip(f"there is no {program} of Erlang")
    return found[-1]


def _program(name: str) -> str | None:
    places = ["/usr/lib/erlang/bin", *map(str, Path("/usr/lib/erlang/lib").glob("*/bin"))]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


class Broker:
    """A broker that a test stops, kills, blocks and wipes."""

    def __init__(
        self, directory: Path, erlang: str = ONE_SCHEDULER, first: Broker | None = None
    ) -> None:
        """`first` is the first node of a cluster that this one is to be in, see `join`."""
        self.directory = directory
        self._first = first
        (self.port, self._dist, self._epmd_port), self._holds = hold_ports(3)
        self.node = f"mailerq{self.port}@localhost"
        self._server = _server()
        self._process: subprocess.Popen[bytes] | None = None
        self._vhosts = 0
        self._cookie = secrets.token_hex(10).upper()
        if first is not None:
            self._epmd_port, self._cookie = first._epmd_port, first._cookie
        directory.joinpath("plugins").write_text("[].")
        directory.joinpath("rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\n"
            f"loopback_users = none\ndefault_user = {USER}\ndefault_pass = {PASSWORD}\n"
            "disk_free_limit.absolute = 1MB\n"
        )
        cookie = directory / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        self._environment = {
            **os.environ,
            "HOME": str(directory),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._dist),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erlang,
        }
        self._epmd: subprocess.Popen[bytes] | None = None
        if first is None:
            self._epmd = subprocess.Popen(
                [str(_program("epmd")), "-address", "127.0.0.1", "-port", str(self._epmd_port)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def start(self) -> None:
        """Start the server and wait until it takes connections; skip the test if it does not."""
        output = self.directory / "output"
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                [str(self._server)], env=self._environment, cwd=self.directory,
                stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)  # nothing says when the port is open
            else:
                return
        self.kill()
        pytest.skip(f"rabbitmq-server does not start: {output.read_text(errors='replace')[-500:]}")

    @property
    def pid(self) -> int:
        """The process whose children the server is."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End the server in an orderly way."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop the virtual machine: connections stay open, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # The server is a shell script with the virtual machine as its child.
        os.killpg(process.pid, number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        while _group_lives(process.pid):
            time.sleep(0.02)

    def restart(self) -> None:
        """Stop the broker and start it again inside its virtual machine, which is faster."""
        self.call("rabbit:stop()")
        self.call("rabbit:start()")

    def close(self) -> None:
        self.stop()
        if self._epmd is not None:
            self._epmd.terminate()
            self._epmd.wait()
        for hold in self._holds:
            hold.close()

    def join(self) -> None:
        """Join the cluster of the first node."""
        assert self._first is not None
        self.call("rabbit:stop()")
        self.call(f"rabbit_mnesia:join_cluster('{self._first.node}', disc)")
        self.call("rabbit:start()")

    def wipe(self) -> None:
        """Remove all data of a stopped server."""
        shutil.rmtree(self.directory / "data")

    def call(self, expression: str) -> str:
        """Evaluate Erlang in the server; return the value as ``{ok, value}``."""
        done = subprocess.run(
            [str(_program("erl_call")), "-c", self._cookie, "-name", self.node, "-e"],
            input=f"{expression}.\n", env=self._environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout.startswith("{ok"), done.stdout + done.stderr
        return done.stdout

    def vhost(self) -> Address:
        """Make a new vhost, empty and apart from all others; return its address."""
        self._vhosts += 1
        name = f"test{self._vhosts}"
        self.mend()
        self.add_vhost(name)
        return Address("127.0.0.1", self.port, USER, PASSWORD, name)

    def add_vhost(self, name: str) -> None:
        self.call(f'rabbit_vhost:add(<<"{name}">>, <<"test">>)')
        self._allow(name, ".*")

    def allow(self, address: Address, *, write: str = ".*") -> None:
        """Let the user of the tests configure and read everything, and write as said."""
        self._allow(address.vhost, write)

    def _allow(self, vhost: str, write: str) -> None:
        self.call(
            "rabbit_auth_backend_internal:set_permissions("
            f'<<"{USER}">>, <<"{vhost}">>, <<".*">>, <<"{write}">>, <<".*">>, <<"test">>)'
        )

    def drop_vhost(self, address: Address) -> None:
        vhost = f'<<"{address.vhost}">>'
        # Wait until each quorum queue has a leader: `mend` says why.
        self.call(
            f"[catch ra:members(amqqueue:get_pid(Q), 5000) || Q <- rabbit_amqqueue:list({vhost}),"
            " amqqueue:get_type(Q) =:= rabbit_quorum_queue], ok"
        )
        self.call(f'rabbit_vhost:delete({vhost}, <<"test">>)')

    def mend(self) -> None:
        """Restart the supervisor of RabbitMQ that serves dead letters, if it has ended.

        RabbitMQ 3.10 ends the supervisor for good when a quorum queue with a time to live is
        deleted during the election of a leader. Each such queue then fails: 541 INTERNAL_ERROR.
        """
        self.call(
            "case whereis(rabbit_fifo_dlx_sup) of"
            " undefined -> supervisor:restart_child(rabbit_sup, rabbit_fifo_dlx_sup);"
            " _ -> ok end"
        )

    def depths(self) -> dict[str, tuple[int, int]]:
        """Ready and unacknowledged messages of all queues that are not empty, of all vhosts.

        The numbers of the latter are some seconds old. A queue without a leader looks empty.
        """
        depth = (
            "[element(4, amqqueue:get_name(Q)), element(2, rabbit_amqqueue:stat(Q)),"
            " proplists:get_value(messages_unacknowledged,"
            " rabbit_amqqueue:info(Q, [messages_unacknowledged]))]"
        )
        answer = self.call(
            f"lists:flatten([io_lib:format('~s ~p ~p|', {depth})"
            " || V <- rabbit_vhost:list_names(), Q <- rabbit_amqqueue:list(V)])"
        )
        depths = {}
        for line in answer.partition('"')[2].rpartition('"')[0].split("|")[:-1]:
            name, ready, unacknowledged = line.rsplit(" ", 2)
            depths[name] = int(ready), int(unacknowledged)
        return {name: depth for name, depth in depths.items() if any(depth)}

    def alarm(self, on: bool, resource: str = "memory") -> None:
        """Have the server believe that its memory, or disk, is short, or is not any more."""
        source = f"{{resource_limit, {resource}, '{self.node}'}}"
        # The second call is answered when all connections have been told.
        told = "rabbit_alarm:get_alarms()"
        if on:
            self.call(f"rabbit_alarm:set_alarm({{{source}, []}}), {told}")
        else:
            self.call(f"rabbit_alarm:clear_alarm({source}), {told}")

    def listen(self, port: int, certificate: Path | None = None) -> None:
        """Take connections at one more port, with TLS if there is a certificate and its key."""
        where = f'{{"127.0.0.1", {port}, inet}}'
        if certificate is None:
            self.call(f"rabbit_networking:start_tcp_listener({where}, 2)")
            return
        self.call("rabbit_networking:ensure_ssl()")
        options = f'[{{certfile, "{certificate}"}}, {{keyfile, "{certificate}"}}]'
        self.call(f"rabbit_networking:start_ssl_listener({where}, {options}, 2)")

    def hush(self, port: int) -> None:
        """Take no connections there any more, and end those that are."""
        self.call(f'rabbit_networking:stop_tcp_listener({{"127.0.0.1", {port}, inet}})')

    def close_connections(self, text: str = "closed by the test") -> None:
        """Have the server close all connections."""
        self.call(f'rabbit_networking:close_all_user_connections(<<"{USER}">>, "{text}")')


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def running_broker() -> Iterator[Broker]:
    """A broker for the duration of the context."""
    with tempfile.TemporaryDirectory(prefix="mailerq-broker-") as directory:
        broker = Broker(Path(directory))
        try:
            broker.start()
            yield broker
        finally:
            broker.close()


@contextmanager
def running_cluster(nodes: int = 3) -> Iterator[list[Broker]]:
    """A cluster of brokers on this host, for the duration of the context."""
    with tempfile.TemporaryDirectory(prefix="mailerq-cluster-") as directory:
        brokers: list[Broker] = []
        try:
            for number in range(nodes):
                path = Path(directory, str(number))
                path.mkdir()
                brokers.append(Broker(path, first=brokers[0] if brokers else None))
                brokers[-1].start()
                if number:
                    brokers[-1].join()
            yield brokers
        finally:
            for broker in reversed(brokers):
                broker.close()


@asynccontextmanager
async def channel_to(address: Address) -> AsyncIterator[Channel]:
    """A channel of another client."""
    async with connect(address) as connection:
        yield await connection.channel()


async def send(
    channel: Channel,
    queue: str,
    body: bytes,
    properties: pika.BasicProperties | None = None,
    **more: Any,
) -> None:
    """Publish as an application does that waits for the confirmation.

    RabbitMQ 3.10 may lose an unconfirmed message if the quorum queue has just been declared.
    """
    confirming = await channel.connection.channel()
    confirmed = trio.Event()
    await confirming.confirm(lambda tag, multiple, taken: confirmed.set())
    confirming.publish("", queue, body, properties or pika.BasicProperties(**more))
    await confirmed.wait()
    await confirming.close()
