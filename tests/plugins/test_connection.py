"""What plugins see and set of a connection, each its own view of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mailerq.plugins import Reject
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
