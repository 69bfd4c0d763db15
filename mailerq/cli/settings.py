"""``mailerq config``: every setting, its value, and its origin."""

from __future__ import annotations

import os
from typing import Any

from mailerq.cli.common import command_parser, print_json, print_table
from mailerq.config import SETTINGS, Config, Setting

__all__ = ["main"]


def main(settings: list[str], rest: list[str]) -> int:
    """Show all settings."""
    parser = command_parser("config", "Show all settings, their values and where they were set.")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    parser.add_argument("name", nargs="*", help="settings to show; all, where none is named")
    options = parser.parse_args(rest)
    config = Config.load(settings)
    known = {setting.key: setting for setting in SETTINGS}
    for name in options.name:
        if name not in known:
            parser.error(f"there is no setting {name}")
    shown = [known[name] for name in options.name] or SETTINGS
    if options.json:
        print_json({
            setting.key: {"value": _value(config, setting), "origin": config.origin(setting.key)}
            for setting in shown
        })  # fmt: skip
        return os.EX_OK
    print_table(
        ("SETTING", "VALUE", "FROM"),
        [
            (
                setting.key,
                setting.show(getattr(config, setting.attribute)),
                config.origin(setting.key),
            )
            for setting in shown
        ],
    )
    return os.EX_OK


def _value(config: Config, setting: Setting) -> Any:
    """The value in JSON: numbers as numbers, lists as arrays."""
    value = getattr(config, setting.attribute)
    if setting.secret and value:
        return setting.kind.hide(value)
    if isinstance(value, tuple):
        return [item if isinstance(item, int) else str(item) for item in value]
    return value
