"""Haraka as a peer: fetched with npm into a temporary directory, with its outbound queue.

Haraka is as durable as the project before 250: it writes each mail to a queue file and fsyncs the
file.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from peers import Destination, Failed, Program, Unavailable, find_program, free_port

__all__ = ["Haraka"]

INSTALL_SECONDS: Final = 180.0

PLUGIN: Final = """\
'use strict'
exports.hook_connect_init = (next, connection) => { connection.relaying = true; next() }
exports.hook_rcpt = (next) => next(OK)
exports.hook_get_mx = (next) => next(OK, { exchange: 'HOST', port: PORT })
"""
"""Relays all mail to the sink; everything else keeps Haraka's defaults."""


class Haraka(Program):
    """Haraka with only the plugin that names the sink; one process, like the project."""

    name = "haraka"

    def __init__(self, directory: Path, sink: Destination) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.sink = sink
        self.queue = directory / "queue"

    def prepare(self) -> list[str]:
        node = find_program("node", "nodejs")
        package = self._install()
        shutil.copytree(package / "config", self.directory / "config")
        plugin = PLUGIN.replace("HOST", self.sink.host).replace("PORT", str(self.sink.port))
        for name, text in (
            ("plugins/to_sink.js", plugin),
            ("config/plugins", "to_sink\n"),
            ("config/me", "relay.test\n"),
            ("config/smtp.ini", f"listen={self.address}\n"),
            # A log line for each mail and delivery, like the others.
            ("config/log.ini", "level=notice\n"),
            ("config/outbound.ini", "enable_tls=false\nlocal_mx_ok=true\n"),
        ):
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        self.queue.mkdir(exist_ok=True)
        return [node, str(package / "bin" / "haraka"), "-c", str(self.directory)]

    def _install(self) -> Path:
        """Fetch Haraka; returns the path of the package."""
        npm = find_program("npm", "npm")
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "haraka"]
        place = self.directory / "npm"
        place.mkdir()
        # Without a package.json of its own npm would look for one in the folders above.
        (place / "package.json").write_text("{}")
        try:
            subprocess.run(
                command, cwd=place, capture_output=True, check=True, timeout=INSTALL_SECONDS
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"npm cannot install haraka: {error}") from None
        package = place / "node_modules" / "haraka"
        if not (package / "bin" / "haraka").exists():
            raise Failed(f"npm has installed no {package}/bin/haraka")
        return package

    def waiting(self) -> int:
        return sum(1 for _ in self.queue.iterdir())
