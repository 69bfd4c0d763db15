"""Python's door to what the core knows of ends and standstills: who crashed, hangs, or is late.

A plugin is C in this process: it can crash it, call exit(), or never return. The core then writes
a last line that names the plugin and the function, from a signal handler or a thread that needs
nothing of Python's. It goes to standard error, and to where `report_to` says.
"""

from __future__ import annotations

from mailerq._core import Watch, move_deadline, report_to, set_deadline

__all__ = ["Watch", "move_deadline", "report_to", "set_deadline"]
