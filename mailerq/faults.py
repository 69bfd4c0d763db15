"""Reports about plugins that crash, exit or hang.

A plugin is C code in this process: it can crash the process, call exit(), or never return. The
core then writes one line that names the plugin and the function. A signal handler or a thread
without Python writes the line, to standard error and to the targets of `report_to`.
"""

from __future__ import annotations

from mailerq._core import Watch, move_deadline, report_to, set_deadline

__all__ = ["Watch", "move_deadline", "report_to", "set_deadline"]
