"""The rights of the process: what it gives up for good, and in whose name it touches files.

Root must not trust a directory that an account may write to: there may be links in it, and files
that root makes there the account could not open. So what root does there it does as that account.
"""

from __future__ import annotations

import logging
import os
import pwd
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mailerq import _core

__all__ = ["as_account", "as_owner", "give_to", "keep_for_ports", "no_new_privileges"]

log = logging.getLogger("mailerq")

_acting: Final = threading.RLock()
"""Held while the process acts as an account: all of its threads do then."""

CHOWN: Final = 1 << 0
DAC_READ_SEARCH: Final = 1 << 2
KILL: Final = 1 << 5
SETGID: Final = 1 << 6
SETUID: Final = 1 << 7
NET_BIND_SERVICE: Final = 1 << 10
"""Capabilities, as bits of their numbers in linux/capability.h."""

KEPT: Final = NET_BIND_SERVICE | SETUID | SETGID | KILL | CHOWN
"""What a parent needs: for the ports and the account of its processes, to end them, and to give
a new log file to the account."""

EVERYTHING: Final = (1 << 64) - 1


def no_new_privileges() -> None:
    """Have no program that this process starts gain rights by its file, as setuid does."""
    try:
        _core.no_new_privileges()
    except OSError as error:
        log.warning("programs may still gain rights by setuid: %s", error.strerror)


def keep_for_ports(*, account: bool) -> None:
    """Drop all capabilities but those that a parent of several processes needs.

    With an `account` that they change to, its processes start with no more than these and the
    right to read what the settings name, as a key that is another account's. Where a container
    does not allow that, the log says so.
    """
    bounding = KEPT | DAC_READ_SEARCH if account and os.geteuid() == 0 else EVERYTHING
    try:
        _core.keep_capabilities(KEPT, bounding)
    except OSError as error:
        log.warning("capabilities that are not needed cannot be dropped: %s", error.strerror)


@contextmanager
def as_account(uid: int, gid: int) -> Iterator[None]:
    """Act as an account, where this process is root and the account is not."""
    with _acting:
        if os.geteuid() != 0 or uid == 0:
            yield
            return
        group, groups = os.getegid(), os.getgroups()
        os.setgroups([gid])
        os.setegid(gid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(group)
            os.setgroups(groups)


@contextmanager
def as_owner(directory: str, user: str = "") -> Iterator[None]:
    """Act as the account that owns a directory; as `user` where that is root. Raises OSError."""
    owner = os.stat(directory)
    uid, gid = owner.st_uid, owner.st_gid
    if uid == 0 and (account := _account(user)):
        uid, gid = account.pw_uid, account.pw_gid
    with as_account(uid, gid):
        yield


def give_to(user: str, path: str) -> None:
    """Give what root has made to the account that will use it. Raises OSError."""
    if os.geteuid() == 0 and (account := _account(user)):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _account(user: str) -> pwd.struct_passwd | None:
    """The account of a name; None for one that is not there, which the engine complains of."""
    try:
        return pwd.getpwnam(user) if user else None
    except KeyError:
        return None
