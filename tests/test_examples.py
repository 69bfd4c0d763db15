"""The example plugins: each builds as it says, warns of nothing, and does what it promises."""

from __future__ import annotations

import email
import email.policy
import re
import shlex
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.message import Message
from mailerq.plugins import Connection, Context, Plugins, Reject

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "plugins").glob("*.c"), *(ROOT / "plugins").glob("*.cpp")])
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]

HEADER = (ROOT / "include" / "mailerq.h").read_text()
CALLBACKS = set(re.findall(r"^MQ_EXPORT \w+ (mq_\w+)\(", HEADER, re.MULTILINE))
OFFERED = set(re.findall(r"^MQ_EXPORT [\w ]+[ *](MQ_\w+)\(", HEADER, re.MULTILINE))

examples = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def build_line(source: Path) -> list[str]:
    """The one line in the comment at the top that builds the plugin."""
    (line,) = re.findall(r"^ \*      (c(?:c|\+\+) .*)$", source.read_text(), re.MULTILINE)
    return shlex.split(line)


def build(source: Path, target: Path, *flags: str) -> Path:
    """Build as the plugin's own line says, with the target elsewhere and flags in front."""
    compiler, *arguments = build_line(source)
    assert arguments[arguments.index("-o") + 1] == f"{source.stem}.so"
    arguments[arguments.index("-o") + 1] = str(target)
    subprocess.run([compiler, *flags, *arguments], cwd=source.parent, check=True)
    return target


def symbols(library: Path, *options: str) -> set[str]:
    answer = subprocess.run(
        ["nm", "--dynamic", *options, library], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].partition("@")[0] for line in answer.stdout.splitlines()}


@examples
def test_an_example_builds_with_its_own_line_and_without_a_warning(
    source: Path, tmp_path: Path
) -> None:
    standard = "-std=c99" if source.suffix == ".c" else "-std=c++17"
    library = build(source, tmp_path / "plugin.so", standard, *STRICT)
    exported = {name for name in symbols(library, "--defined-only") if not name.startswith("_")}
    assert "mq_version" in exported
    assert exported <= CALLBACKS
    needed = {name for name in symbols(library, "--undefined-only") if name.startswith("MQ_")}
    assert needed <= OFFERED


@examples
def test_an_example_needs_no_symbol_that_its_line_does_not_link(
    source: Path, tmp_path: Path
) -> None:
    offered = tmp_path / f"offered{source.suffix}"
    linkage = 'extern "C" ' if source.suffix == ".cpp" else ""
    offered.write_text("".join(f"{linkage}void {name}(void) {{}}\n" for name in sorted(OFFERED)))
    library = build(source, tmp_path / "plugin.so", "-Wl,--no-undefined", str(offered))
    assert library.exists()


def test_trace_has_every_callback(tmp_path: Path) -> None:
    source = ROOT / "plugins" / "trace.c"
    library = build(source, tmp_path / "trace.so", "-DTRACE_MESSAGE_ID", *STRICT)
    assert symbols(library, "--defined-only") >= CALLBACKS


def test_trace_leaves_message_ids_alone_unless_told(tmp_path: Path) -> None:
    library = build(ROOT / "plugins" / "trace.c", tmp_path / "trace.so")
    assert CALLBACKS - symbols(library, "--defined-only") == {
        "mq_message_id",
        "mq_message_id_size",
    }


def test_the_readme_lists_every_example() -> None:
    text = (ROOT / "plugins" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\S+)\]\(\1\)", text, re.MULTILINE)
    assert sorted(listed) == [source.name for source in SOURCES]


# What they do. The plugins are driven as the engine drives them, without the engine.


@asynccontextmanager
async def loaded(directory: Path, *sources: str) -> AsyncIterator[Context]:
    """A worker with these plugins, in this order."""
    directory.mkdir(exist_ok=True)
    for number, name in enumerate(sources):
        source = ROOT / "plugins" / name
        build(source, directory / f"{number}-{source.stem}.so")
    plugins = Plugins.load(str(directory), timeout=20)
    plugins.initialize()
    context = await plugins.open_context(0)
    try:
        yield context
    finally:
        await context.close()
        plugins.cleanup()


@asynccontextmanager
async def connected(context: Context, client: str = "127.0.0.1") -> AsyncIterator[Connection]:
    """A connection over loopback, from connect to close; another `client` is behind a proxy."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()) as peer:
            server, _ = listening.accept()
            with server, peer:
                connection = context.connection(server.fileno())
                connection.address = client
                assert await connection.connect() is None
                try:
                    yield connection
                finally:
                    await connection.close()


async def try_recipient(
    context: Context,
    sender: str = "a@b.test",
    recipient: str = "c@d.test",
    client: str = "127.0.0.1",
) -> Reject | None:
    async with connected(context, client) as connection:
        assert await connection.mailfrom(sender) is None
        return await connection.rcptto(recipient)


async def send_out(context: Context, body: bytes | None, **properties: Any) -> bytes | None:
    """What the plugins make of an outgoing mail."""
    message = Message({"envelope": "a@b.test", "recipient": "c@d.test", **properties}, body)
    async with connected(context) as connection:
        assert await connection.out_data(message) is None
        return message.body


PLAIN = b"Subject: x\r\n\r\nhello\r\n"


async def test_footer_is_added_to_plain_text_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOOTER_TEXT", "one\\ntwo")
    async with loaded(tmp_path / "p", "footer.c") as context:
        once = await send_out(context, PLAIN)
        assert once == PLAIN + b"one\r\ntwo\r\n"
        assert await send_out(context, once) == once
        assert await send_out(context, b"A: b\r\n\r\n") == b"A: b\r\n\r\none\r\ntwo\r\n"
        assert await send_out(context, b"\r\nhi") == b"\r\nhi\r\none\r\ntwo\r\n"
        nul = b"A: b\r\n\r\nbefore\0after\r\n"
        assert await send_out(context, nul) == nul + b"one\r\ntwo\r\n"


@pytest.mark.parametrize(
    "mail",
    [
        b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x--\r\n",
        b"content-type:\r\n text/html\r\n\r\n<p>\r\n",
        b"Content-Type: text/plainest\r\n\r\nx\r\n",
        b"Content-Transfer-Encoding: base64\r\n\r\naGk=\r\n",
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n=20\r\n",
        b"DKIM-Signature: v=1\r\nSubject: x\r\n\r\nhi\r\n",
        b"ARC-Message-Signature: i=1\r\n\r\nhi\r\n",
        b"Subject: x\r\n\r\n-----BEGIN PGP SIGNED MESSAGE-----\r\n",
        b"Subject: no body\r\n",
        b"",
        None,
    ],
)
async def test_footer_leaves_alone_what_it_would_break(tmp_path: Path, mail: bytes | None) -> None:
    async with loaded(tmp_path / "p", "footer.c") as context:
        assert await send_out(context, mail) == mail


async def test_footer_beyond_ascii_needs_a_mail_in_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOOTER_TEXT", "grüße")
    utf8 = b'Content-Type: text/plain; charset="UTF-8"\r\nContent-Transfer-Encoding: 8bit\r\n\r\n'
    async with loaded(tmp_path / "p", "footer.c") as context:
        assert await send_out(context, PLAIN) == PLAIN
        assert await send_out(context, utf8) == utf8 + "grüße\r\n".encode()
        assert await send_out(context, utf8.replace(b"8bit", b"7bit")) != utf8


async def test_greylist_refuses_the_first_try_of_each_triplet(tmp_path: Path) -> None:
    async with loaded(tmp_path / "p", "greylist.c") as context:
        first = await try_recipient(context)
        assert first == (451, "4.7.1 Greylisted, please try again later")
        assert await try_recipient(context) is None
        assert await try_recipient(context, recipient="C@D.test") is None
        assert await try_recipient(context, recipient="e@d.test") is not None
        assert await try_recipient(context, sender="") is not None


async def test_greylist_tells_the_clients_of_a_proxy_apart(tmp_path: Path) -> None:
    async with loaded(tmp_path / "p", "greylist.c") as context:
        for client in ("192.0.2.1", "198.51.100.1", "2001:db8::1"):
            assert await try_recipient(context, client=client) is not None
        for client in ("192.0.2.99", "::ffff:198.51.100.2", "2001:db8::2"):
            assert await try_recipient(context, client=client) is None


async def test_greylist_waits_its_delay_and_spares_who_has_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GREYLIST_DELAY", "300")
    async with loaded(tmp_path / "p", "greylist.c") as context:
        assert await try_recipient(context) is not None
        assert await try_recipient(context) is not None
        async with connected(context) as connection:
            connection.authenticated = True
            assert await connection.mailfrom("a@b.test") is None
            assert await connection.rcptto("c@d.test") is None


async def test_greylist_stays_within_its_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GREYLIST_SLOTS", "8")
    async with loaded(tmp_path / "p", "greylist.c") as context:
        assert await try_recipient(context) is not None
        assert await try_recipient(context) is None
        async with connected(context) as connection:
            assert await connection.mailfrom("a@b.test") is None
            for number in range(50):
                assert await connection.rcptto(f"{number}@d.test") is not None
        # Strangers push out strangers, not those who are known.
        assert await try_recipient(context) is None


def test_messageid_makes_ids_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESSAGEID_PREFIX", "here")
    directory = tmp_path / "p"
    directory.mkdir()
    build(ROOT / "plugins" / "messageid.c", directory / "messageid.so")
    plugins = Plugins.load(str(directory))
    plugins.initialize()
    ids = [plugins.message_id() for _ in range(1000)]
    plugins.cleanup()
    assert len(set(ids)) == 1000
    assert all(re.fullmatch(r"here-[0-9a-f]{11}-[0-9a-f]{16}-[0-9a-f]+", id) for id in ids)


async def test_delay_holds_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELAY_SECONDS", "0.2")
    async with loaded(tmp_path / "p", "delay.c") as context, trio.open_nursery() as nursery:
        start = trio.current_time()
        for _ in range(20):
            nursery.start_soon(try_recipient, context)
        with trio.fail_after(60):
            while nursery.child_tasks:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert trio.current_time() - start >= 0.2


async def test_delay_holds_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELAY_SECONDS", "60")
    async with loaded(tmp_path / "p", "delay.c") as context, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(try_recipient, context)
        await trio.testing.wait_all_tasks_blocked()
        async with connected(context) as connection:
            connection.authenticated = True
            assert await connection.rcptto("c@d.test") is None
            assert len(nursery.child_tasks) == 20
        context.plugins.timeout = 0.01  # the test does not wait for them


async def policy_server(
    answer: Callable[[dict[str, str]], bytes], *, task_status: trio.TaskStatus[int]
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        data = b""
        async with stream:
            async for some in stream:
                data += some
                if data.endswith(b"\n\n"):
                    lines = data.decode().split("\n")[:-2]
                    await stream.send_all(answer(dict(line.split("=", 1) for line in lines)))
                    return

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        task_status.started(port)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (b"action=DUNNO\n\n", None),
        (b"action=ok\n\n", None),
        (b"action=prepend X-A: b\n\n", None),
        (b"action=REJECT not you\r\n\r\n", (554, "5.7.1 not you")),
        (b"action=defer_if_permit wait\n\n", (451, "4.7.1 wait")),
        (b"action=550 5.1.1 nobody\n\n", (550, "5.1.1 nobody")),
        (b"result=x\n\n", (451, "4.3.5 Policy lookup failed, try again later")),
        (b"action=" + b"x" * 5000, (451, "4.3.5 Policy lookup failed, try again later")),
        (b"", (451, "4.3.5 Policy lookup failed, try again later")),
    ],
)
async def test_lookup_does_what_the_policy_server_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: bytes,
    expected: tuple[int, str] | None,
    nursery: trio.Nursery,
) -> None:
    requests = []

    def answer(request: dict[str, str]) -> bytes:
        requests.append(request)
        return action

    port = await nursery.start(policy_server, answer)
    monkeypatch.setenv("LOOKUP_SERVER", f"127.0.0.1:{port}")
    async with loaded(tmp_path / "p", "lookup.c") as context:
        assert await try_recipient(context, client="192.0.2.9") == expected
    (request,) = requests
    assert request["request"] == "smtpd_access_policy"
    assert request["protocol_state"] == "RCPT"
    assert (request["sender"], request["recipient"]) == ("a@b.test", "c@d.test")
    assert request["client_address"] == "192.0.2.9"


@pytest.mark.parametrize(("fallback", "code"), [("451", 451), ("0", None)])
async def test_lookup_without_a_server_does_as_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: str, code: int | None
) -> None:
    monkeypatch.setenv("LOOKUP_FALLBACK", fallback)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LOOKUP_SERVER", f"127.0.0.1:{closed.getsockname()[1]}")
        async with loaded(tmp_path / "p", "lookup.c") as context:
            refused = await try_recipient(context)
            assert (refused and refused.code) == code


async def test_lookup_gives_up_a_server_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("LOOKUP_SERVER", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("LOOKUP_TIMEOUT", "0.05")
        async with loaded(tmp_path / "p", "lookup.c") as context:
            refused = await try_recipient(context)
            assert refused is not None
            assert refused.code == 451


async def test_auth_knows_good_and_bad_passwords_and_leaves_strangers_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Made with: openssl passwd -6 -salt saltsalt secret
    hash = (
        "$6$saltsalt$TVLlQcbpFVof5W3Yz4DTP6gRstiNuHwwTt6GLc1E5n0U0aDehy0S5knV8wiOQSpT0Y77vwPZN."
        "Pq.H91p5hVO1"
    )
    file = tmp_path / "passwd"
    file.write_text(f"# who may\nann:{hash}:more\nbroken:nonsense\n")
    monkeypatch.setenv("AUTH_FILE", str(file))
    async with loaded(tmp_path / "p", "auth.c") as context:

        async def log_in(login: str, password: str) -> bool | Reject | None:
            async with connected(context) as connection:
                return await connection.authenticate(login, password)

        assert await log_in("ann", "secret") is True
        assert await log_in("ann", "wrong") is False
        assert await log_in("broken", "nonsense") is False
        assert await log_in("bob", "secret") is None
        assert await log_in("an", "secret") is None
        assert await log_in("ann\0", "secret") is None
        async with connected(context) as connection:
            assert await connection.authenticate("ann", "wrong") is False
            assert await connection.authenticate("ann", "secret") is True
            assert connection.authenticated
        file.unlink()
        refused = await log_in("ann", "secret")
        assert isinstance(refused, Reject)
        assert refused.code == 454


async def test_mimegen_writes_a_mail_that_python_can_read(tmp_path: Path) -> None:
    subject = "Grüße an {name}, " + "é" * 100
    source = {
        "from": "Ladén <news@shop.test>",
        "subject": subject + "\r\nBcc: evil@x.test",
        "text": "Dear {name},\nit costs {price} {unknown} {\n",
        "html": "<p>{name}</p>",
    }
    values = {"name": "Ann & <Bob>", "price": 9}
    async with loaded(tmp_path / "p", "mimegen.cpp") as context:
        body = await send_out(context, None, generate=source, values=values)
        assert await send_out(context, PLAIN, generate=source) == PLAIN
        assert await send_out(context, None) is None
    assert body is not None
    assert all(len(line) <= 78 for line in body.split(b"\r\n"))
    assert b"\n" not in body.replace(b"\r\n", b"")
    mail = email.message_from_bytes(body, policy=email.policy.SMTP)
    assert mail["subject"] == subject.replace("{name}", "Ann & <Bob>") + "  Bcc: evil@x.test"
    assert mail["bcc"] is None
    assert mail["from"].addresses[0].display_name == "Ladén"
    assert mail["to"] == "c@d.test"
    assert mail["date"].datetime is not None
    text, html = mail.iter_parts()
    assert text.get_content().replace("\r\n", "\n") == "Dear Ann & <Bob>,\nit costs 9 {unknown} {\n"
    assert html.get_content() == "<p>Ann &amp; &lt;Bob&gt;</p>"


async def test_mimegen_refuses_for_good_what_it_cannot_make_a_mail_of(tmp_path: Path) -> None:
    async with loaded(tmp_path / "p", "mimegen.cpp") as context:
        for source in ({"from": "a@b.test"}, {"text": "x"}, {"from": 1, "text": "x"}, "x"):
            message = Message({"recipient": "c@d.test", "generate": source})
            async with connected(context) as connection:
                refused = await connection.out_data(message)
                assert refused is not None
                assert refused.code == 554


async def test_tag_notes_what_the_session_knew(tmp_path: Path) -> None:
    message = Message({"envelope": "a@b.test", "recipient": "c@d.test", "tags": ["own"]}, PLAIN)
    async with loaded(tmp_path / "p", "tag.c") as context, connected(context) as connection:
        assert await connection.mailfrom("a@b.test") is None
        assert await connection.rcptto("c@d.test") is None
        assert await connection.rcptto("e@f.test") is None
        assert await connection.data(PLAIN) is None
        assert await connection.message(message) is None
    assert message.properties["tags"] == ["own", "smtp"]
    transaction = message.properties["transaction"]
    assert (transaction["recipients"], transaction["size"]) == (2, len(PLAIN))
    assert 0 <= transaction["seconds"] < 60
    assert message.body == PLAIN


async def test_trace_logs_each_event_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mailerq.plugins")
    message = Message({"envelope": "a@b.test", "recipient": "c@d.test"}, PLAIN)
    async with (
        loaded(tmp_path / "p", "null.c", "trace.c") as context,
        connected(context) as connection,
    ):
        connection.secure = True
        assert await connection.secured() is None
        assert await connection.authenticate("ann", "the password") is None
        assert await connection.mailfrom("") is None
        assert await connection.rcptto("c@d.test") is None
        assert await connection.data(PLAIN) is None
        assert await connection.message(message) is None
        assert await connection.out_data(message) is None
        await connection.out_sent(message)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert re.findall(r"\b((?:context_|in_|out_)[a-z]+|initialize|cleanup)\b", logged) == [
        "initialize", "context_initialize", "in_connect", "in_secure", "in_authenticate",
        "in_mailfrom", "in_rcptto", "in_data", "in_message", "out_data", "out_sent", "in_close",
        "context_cleanup", "cleanup",
    ]  # fmt: skip
    assert "the password" not in logged
