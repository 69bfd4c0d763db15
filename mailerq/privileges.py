"""Drop rights of the process for good, and act as another account on files.

Root must not work as root in a directory that another account may write to: the directory may
contain links, and the account could not open files that root creates there. Root acts as that
account instead.
"""

from __future__ import annotations

import logging
import os
import pwd
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mailerq import _core
from mailerq.errors import ConfigError

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["as_account", "as_owner", "become", "give_to", "keep_for_ports", "no_new_privileges"]

log = logging.getLogger("mailerq")

_acting: Final = threading.RLock()
"""Held while the process acts as an account, because this applies to all threads."""

CHOWN: Final = 1 << 0
DAC_READ_SEARCH: Final = 1 << 2
KILL: Final = 1 << 5
SETGID: Final = 1 << 6
SETUID: Final = 1 << 7
NET_BIND_SERVICE: Final = 1 << 10
"""Capabilities, as bits of their numbers in linux/capability.h."""

KEPT: Final = NET_BIND_SERVICE | SETUID | SETGID | KILL | CHOWN
"""The parent needs these to open ports, to change the account of its processes, to end them, and to
give that account a new log file."""

EVERYTHING: Final = (1 << 64) - 1


def no_new_privileges() -> None:
    """Keep programs that this process starts from gaining rights by setuid."""
    try:
        _core.no_new_privileges()
    except OSError as error:
        log.warning("programs may still gain rights by setuid: %s", error.strerror)


def keep_for_ports(*, account: bool) -> None:
    """Drop all capabilities except those that the parent of several processes needs.

    With `account`, the processes change to another account. They start with the same capabilities
    plus the right to read any file, for keys that belong to a third account. If a container does
    not allow this, the log says so.
    """
    bounding = KEPT | DAC_READ_SEARCH if account and os.geteuid() == 0 else EVERYTHING
    try:
        _core.keep_capabilities(KEPT, bounding)
    except OSError as error:
        log.warning("capabilities that are not needed cannot be dropped: %s", error.strerror)


@contextmanager
def as_account(uid: int, gid: int) -> Iterator[None]:
    """Act as an account, if this process is root and the account is not."""
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
    """Act as the owner of a directory, or as `user` if the owner is root. Raises OSError."""
    owner = os.stat(directory)
    uid, gid = owner.st_uid, owner.st_gid
    if uid == 0 and (account := _account(user)):
        uid, gid = account.pw_uid, account.pw_gid
    with as_account(uid, gid):
        yield


def give_to(user: str, path: str) -> None:
    """Change the owner of a file from root to the account that will use it. Raises OSError."""
    if os.geteuid() == 0 and (account := _account(user)):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _account(user: str) -> pwd.struct_passwd | None:
    """Return the account of a name. None if there is none, which the engine reports."""
    try:
        return pwd.getpwnam(user) if user else None
    except KeyError:
        return None


def become(config: Config) -> None:
    """Change to the account in `user`, for good. Raises `ConfigError`."""
    try:
        account = pwd.getpwnam(config.user)
        os.initgroups(config.user, account.pw_gid)
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    except KeyError:
        raise ConfigError(config.origin("user"), f"user: {config.user}: no such account") from None
    except OSError as error:
        raise ConfigError(
            config.origin("user"), f"user: cannot become {config.user}: {error.strerror}"
        ) from None
