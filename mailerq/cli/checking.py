"""``mailerq check-config``: whether a daemon would start with these settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from mailerq.cli.common import command_parser, print_json
from mailerq.config import Config
from mailerq.escaping import escape

__all__ = ["main"]


def main(settings: list[str], rest: list[str]) -> int:
    """Check the settings; an error leaves as `ConfigError`."""
    parser = command_parser(
        "check-config", "Check the settings and what they point to. Nothing is started or opened."
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options = parser.parse_args(rest)
    config = Config.load(settings)
    notes = list(_notes(config))
    _check_files(config)
    if options.json:
        print_json({"ok": True, "notes": notes})
        return os.EX_OK
    for note in notes:
        sys.stdout.write(f"note: {escape(note)}\n")
    sys.stdout.write("the configuration is good\n")
    return os.EX_OK


def _check_files(config: Config) -> None:
    """Read what the server reads when it starts. Raises `ConfigError`."""
    from mailerq.net.addresses import LocalAddresses
    from mailerq.net.auth import Authenticator
    from mailerq.net.tls import tls_context
    from mailerq.rules.steering import Steering

    Authenticator.of(config)
    LocalAddresses.of(config)
    Steering.of(config)
    paths = [config.smtp_certificate, config.smtp_key]
    if all(not path or not os.path.exists(path) or os.access(path, os.R_OK) for path in paths):
        tls_context(config)  # else it is for the daemon's user to read


def _notes(config: Config) -> Iterator[str]:
    """What is no error and may still surprise."""
    directory = config.plugin_directory
    if not directory:
        yield "plugin-directory is empty: no plugins are loaded"
    elif not os.path.isdir(directory):
        yield f"plugin-directory {directory} is missing: no plugins are loaded"
    elif plugins := sorted(name for name in os.listdir(directory) if name.endswith(".so")):
        yield f"plugin-directory {directory} has {', '.join(plugins)}"
    else:
        yield f"plugin-directory {directory} has no *.so in it: no plugins are loaded"
    if not os.path.isdir(config.queue_directory):
        yield f"queue-directory {config.queue_directory} is missing: the daemon will make it"
    elif not os.access(config.queue_directory, os.R_OK | os.W_OK | os.X_OK):
        yield f"queue-directory {config.queue_directory} is not writable for this user"
    for key in ("smtp-certificate", "smtp-key"):
        path = config.text(key)
        if path and not os.access(path, os.R_OK):
            yield f"{key} {path} cannot be read by this user"
    if config.smtp_sink_address:
        yield f"smtp-sink-address is set: all mail goes to {config.smtp_sink_address}"
    if not config.smtp_range and any(network.prefixlen == 0 for network in config.smtp_relay_range):
        yield "smtp-relay-range lets everybody relay: this is an open relay"
