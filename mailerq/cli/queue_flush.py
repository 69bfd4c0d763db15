"""``mailerq queue flush``, wherever the queues are."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable

from mailerq.cli import control
from mailerq.cli.common import complain, print_json
from mailerq.config import Config

__all__ = ["flush"]


def flush(config: Config, options: Namespace, hasten: Callable[[], int]) -> int:
    """Have the daemon try what waits in the outbox; return the exit status.

    `hasten` prepares that and returns the number of messages. Without a daemon nothing would be
    tried, so `hasten` is not called. Raises the errors of `hasten`, and `OSError`.
    """
    try:
        control.ask(config.queue_directory, "wake")
    except PermissionError:
        raise
    except OSError:
        complain(f"no daemon runs on {config.queue_directory}: nothing is tried before one does")
        return os.EX_UNAVAILABLE
    count = hasten()
    control.ask(config.queue_directory, "wake", everything=True)
    if options.json:
        print_json({"queue": config.rabbitmq_outbox, "hastened": count})
    elif not options.quiet:
        sys.stdout.write(f"{count} messages of {config.rabbitmq_outbox} are tried now\n")
    return os.EX_OK
