"""How many bodies a storage takes and gives in a second, and the processor time of each.

    python benches/storage.py directory:///var/tmp/bodies [--size 20000] [--count 1000] [--lanes 50]

What is put expires within the hour.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Awaitable, Callable

import trio

from mailerq.config import Config
from mailerq.storage import open_storage


async def measure(
    name: str, count: int, lanes: int, work: Callable[[int], Awaitable[None]]
) -> None:
    """Do a number of works in so many tasks, and print what they took."""

    async def lane(first: int) -> None:
        for number in range(first, count, lanes):
            await work(number)

    began, used = time.perf_counter(), time.process_time()
    async with trio.open_nursery() as nursery:
        for first in range(lanes):
            nursery.start_soon(lane, first)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    print(f"{name}  {count / seconds:7.0f}/s  {used / count * 1000:6.2f} ms of processor time each")


async def main(options: argparse.Namespace) -> None:
    config = Config(storage_address=options.address, storage_threads=options.threads)
    bodies = [os.urandom(options.size // 2).hex().encode() for _ in range(options.count)]
    keys = [""] * options.count
    async with open_storage(lambda: config) as storage:
        assert storage is not None, "there is an address"

        async def put(number: int) -> None:
            keys[number] = await storage.put(bodies[number], time.time())

        await measure("put", options.count, options.lanes, put)
    async with open_storage(lambda: config) as storage:  # with nothing in memory
        assert storage is not None, "there is an address"

        async def get(number: int) -> None:
            if await storage.get(keys[number]) != bodies[number]:
                raise SystemExit(f"{keys[number]} is another body")

        await measure("get", options.count, options.lanes, get)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=50, help="tasks at a time")
    parser.add_argument("--threads", type=int, default=4, help="storage-threads")
    trio.run(main, parser.parse_args())
