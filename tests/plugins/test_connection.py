"""What plugins see and set of a connection, each its own view of it."""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path

import pytest
import trio.testing

from mailerq.message import Message
from mailerq.plugins import GIVEN_UP, Plugins, Reject
from tests.plugins.kit import Calls, build_text, connected, install

PLUGIN = """
#include <mailerq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static int own, thread;

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_context_initialize(MQ_Context *context)
{
    if (MQ_ContextData(context)) abort();
    MQ_SetContextData(context, &thread);
    return false;
}

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    if (MQ_SmtpData(connection) || MQ_ContextData(context) != &thread) abort();
    MQ_SetSmtpData(connection, &own);
    return false;
}

static void say(MQ_SmtpConnection *connection)
{
    char text[100];
    struct sockaddr address;
    socklen_t size = sizeof address;
    int failed = getpeername(MQ_SmtpFileDescriptor(connection), &address, &size);
    snprintf(text, sizeof text, "secure %d authenticated %d own %d peer %d",
             MQ_SmtpSecure(connection), MQ_SmtpAuthenticated(connection),
             MQ_SmtpData(connection) == &own, !failed);
    MQ_Log(MQ_INFO, text);
}

MQ_EXPORT bool mq_smtp_in_secure(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    say(connection);
    return false;
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    (void)context;
    (void)mailfrom;
    if (size == 4) MQ_SetSmtpAuthenticated(connection, true);
    say(connection);
    return false;
}

MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize)
{
    (void)context;
    if (loginsize != 3 || strlen(login) != 3) return false;
    if (!strcmp(login, "bad")) MQ_Reject(connection, 535, "Not you");
    else MQ_SetSmtpAuthenticated(connection,
                                 passwdsize == 5 && !memcmp(passwd, "a\\0b\\xc3\\xa9", 5));
    return false;
}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    plugin = build_text(PLUGIN)
    return install(tmp_path, a=plugin, b=plugin)


async def test_each_plugin_has_its_own_data(directory: Path, calls: Calls) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with connected(directory) as (_, context, _):
            for secure in (False, True):
                connection = context.connection(ours.fileno(), secure=secure)
                await connection.connect()
                await connection.mailfrom("")
                assert calls.take() == [
                    f"{name} secure {int(secure)} authenticated 0 own 1 peer 1" for name in "ab"
                ]
                await connection.close()


async def test_secured_is_seen_at_once(directory: Path, calls: Calls) -> None:
    async with connected(directory) as (_, _, connection):
        await connection.secured()
        assert calls.take()[0] == "a secure 1 authenticated 0 own 0 peer 0"


async def test_authenticated_may_be_set_in_any_event(directory: Path, calls: Calls) -> None:
    async with connected(directory) as (_, _, connection):
        assert await connection.mailfrom("good") is None
        assert connection.authenticated
        connection.authenticated = False
        await connection.mailfrom("other")
        assert [line.split()[4] for line in calls.take()] == ["1", "1", "0", "0"]


async def test_plugins_decide_on_a_login(directory: Path) -> None:
    async with connected(directory) as (_, _, connection):
        assert await connection.authenticate("unknown", "x") is None
        assert await connection.authenticate("ann", "a\0bé") is True
        assert await connection.authenticate("ann", "wrong") is False
        assert not connection.authenticated
        assert await connection.authenticate("bad", "x") == Reject(535, "5.7.8 Not you")
        assert await connection.authenticate("\udce4xy", "x") is False  # three bytes, not UTF-8


FACTS = """
#include <mailerq.h>
#include <stdio.h>
#include <string.h>

static const char *kept;

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

static void say(const char *name, const char *text, size_t size)
{
    char line[300];
    if (!text && size) MQ_Log(MQ_CRIT, "NULL has a size");
    if (text && strlen(text) != size) MQ_Log(MQ_CRIT, "the size is wrong");
    snprintf(line, sizeof line, "%s %s", name, text ? text : "NULL");
    MQ_Log(MQ_INFO, line);
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t length)
{
    char port[20];
    const char *text;
    size_t size = 9;
    (void)context;
    (void)length;
    #define SAY(name) \\
        (text = MQ_Client##name(connection, &size), say(#name, text, size))
    SAY(Address);
    SAY(Helo);
    SAY(Login);
    SAY(TlsVersion);
    SAY(TlsCipher);
    SAY(TlsName);
    snprintf(port, sizeof port, "%d", MQ_ClientPort(connection));
    say("Port", port, strlen(port));
    kept = MQ_ClientHelo(connection, NULL);
    return *mailfrom == 'k';
}

MQ_EXPORT void say_kept(void) { say("kept", kept, strlen(kept)); }
"""


async def test_what_is_known_of_the_client_is_seen(tmp_path: Path, calls: Calls) -> None:
    async with connected(install(tmp_path, a=build_text(FACTS))) as (_, _, connection):
        await connection.mailfrom("")
        names = ["Address", "Helo", "Login", "TlsVersion", "TlsCipher", "TlsName"]
        assert calls.take() == [f"a {name} NULL" for name in names] + ["a Port 0"]
        assert (connection.address, connection.port, connection.tls_name) == (None, 0, None)
        connection.address, connection.port = "2001:db8::1", 65535
        connection.helo, connection.login = "caf\u00e9\udcff", ""
        connection.tls_version, connection.tls_cipher = "TLSv1.3", "AES"
        connection.tls_name = "client.test"
        await connection.mailfrom("")
        assert calls.take() == [
            "a Address 2001:db8::1",
            "a Helo caf\u00e9\\xff",
            "a Login ",
            "a TlsVersion TLSv1.3",
            "a TlsCipher AES",
            "a TlsName client.test",
            "a Port 65535",
        ]
        assert (connection.address, connection.port) == ("2001:db8::1", 65535)
        assert (connection.helo, connection.login) == ("caf\u00e9\udcff", "")
        connection.login = None
        await connection.mailfrom("")
        assert "a Login NULL" in calls.take()
    assert calls.take_warnings() == []


async def test_what_a_plugin_was_given_stays_while_it_keeps_an_event(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    directory = install(tmp_path, a=build_text(FACTS))
    plugins = Plugins.load(str(directory), timeout=1)
    context = await plugins.open_context()
    connection = context.connection(-1)
    connection.helo = "first.test"
    assert await connection.mailfrom("keep") == GIVEN_UP
    for number in range(100):
        connection.helo = f"other{number}.test"
    calls.take()
    ctypes.CDLL(str(directory / "a.so")).say_kept()
    assert calls.take() == ["a kept first.test"]
    await connection.close()
    await context.close()


WRITER = """
#include <mailerq.h>
#include <string.h>

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

static bool spoil(const char *text, size_t size)
{
    memset((char *)text, 'X', size);
    return false;
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{ return !context || !connection || spoil(mailfrom, size); }
MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{ return !context || !connection || spoil(rcptto, size); }
MQ_EXPORT bool mq_smtp_in_authenticate(MQ_Context *context, MQ_SmtpConnection *connection,
                                       const char *login, size_t loginsize,
                                       const char *passwd, size_t passwdsize)
{ return !context || !connection || spoil(login, loginsize) || spoil(passwd, passwdsize); }
MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    (void)context;
    spoil(MQ_Envelope(message), 3);
    spoil(MQ_Recipient(message), 3);
    if (MQ_SmtpSend(connection, NULL, 5)) MQ_Log(MQ_CRIT, "sent from nowhere");
    return spoil(MQ_ClientHelo(connection, NULL), 3);
}
"""


async def test_a_plugin_gets_copies_of_our_strings_and_sends_nothing_from_nowhere(
    tmp_path: Path, calls: Calls
) -> None:
    given = [f"{name}@b.test" for name in ("mailfrom", "rcptto", "login", "password")]
    before = [bytearray(text.encode()) for text in given]
    async with connected(install(tmp_path, a=build_text(WRITER))) as (_, _, connection):
        await connection.mailfrom(given[0])
        await connection.rcptto(given[1])
        await connection.authenticate(given[2], given[3])
        connection.helo = helo = "helo.test"
        message = Message({"envelope": given[0], "recipient": given[1]}, b"x")
        await connection.message(message)
        assert message.properties == {"envelope": given[0], "recipient": given[1]}
        assert connection.take_output() == b""
    assert calls.take_warnings() == []
    assert helo == "helo.test"
    assert [text.encode() for text in given] == before
