"""The seconds of `mailerq status` are those that the calls of a plugin took."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.plugins.kit import build_text, connected, install

SLEEPER = r"""
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>
#include <time.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
static void doze(void)
{
    struct timespec pause = {0, 200 * 1000 * 1000};
    nanosleep(&pause, 0);
}
MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)context; (void)connection;
    if (size > 4 && rcptto[0] == 's') doze();
    return false;
}
static void due(void *context) { doze(); MQ_Continue(context); }
MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)connection;
    MQ_TimerStart(context, 0, due, context);
    return true;
}
"""

SLEEP = 0.2

TICKS = 0.03
"""Seconds that the coarse clock may be wrong by, for a few ticks of a slow kernel."""


@pytest.mark.parametrize("before", [0, 1, 127, 128, 129, 5000])
@pytest.mark.parametrize("after", [0, 300])
async def test_one_slow_call_among_fast_ones_counts_as_what_it_took(
    tmp_path: Path, before: int, after: int
) -> None:
    install(tmp_path, sleeper=build_text(SLEEPER))
    async with connected(tmp_path) as (plugins, _, connection):
        start = time.perf_counter()
        for number in range(before + 1 + after):
            await connection.rcptto("slow@d.test" if number == before else "fast@d.test")
        elapsed = time.perf_counter() - start
        row = plugins.statistics()["sleeper.so"]["rcptto"]
    assert row["calls"] == before + 1 + after
    assert SLEEP - TICKS <= row["seconds"] <= elapsed + TICKS


async def test_the_time_of_one_plugin_is_not_counted_for_the_next(tmp_path: Path) -> None:
    quick = SLEEPER.replace("rcptto[0] == 's'", "rcptto[0] == 0")
    install(tmp_path, a=build_text(SLEEPER), b=build_text(quick))
    async with connected(tmp_path) as (plugins, _, connection):
        start = time.perf_counter()
        for _ in range(200):
            await connection.rcptto("fast@d.test")
        await connection.rcptto("slow@d.test")
        elapsed = time.perf_counter() - start
        figures = plugins.statistics()
    assert figures["a.so"]["rcptto"]["seconds"] >= SLEEP - TICKS
    assert figures["b.so"]["rcptto"]["seconds"] <= elapsed - SLEEP + TICKS


async def test_the_time_of_a_timer_is_what_it_took(tmp_path: Path) -> None:
    install(tmp_path, sleeper=build_text(SLEEPER))
    async with connected(tmp_path) as (plugins, _, connection):
        start = time.perf_counter()
        with trio.fail_after(60):
            await connection.connect()
        elapsed = time.perf_counter() - start
        row = plugins.statistics()["sleeper.so"]["timer"]
    assert row["calls"] == 1
    assert SLEEP <= row["seconds"] <= elapsed
