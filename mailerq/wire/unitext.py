r"""International addresses in ORCPT and in reports: the type ``utf-8`` of RFC 6533, section 3.

An address has three forms. The plain one is the address. *unitext* escapes characters that have a
meaning in commands, and so can stand in ORCPT of a mail with SMTPUTF8. *xtext* escapes characters
beside ASCII too, and can stand anywhere. Both write an escape as ``\x{HEX}``.

>>> quote("jörg+news@d.test", ascii=False), quote("jörg+news@d.test", ascii=True)
('jörg\\x{2B}news@d.test', 'j\\x{F6}rg\\x{2B}news@d.test')
>>> unquote("j\\x{F6}rg\\x{2B}news@d.test")
'jörg+news@d.test'
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["KIND", "quote", "requote", "unquote"]

KIND: Final = "utf-8"
"""The type of these addresses, in lower case."""

_ESCAPE: Final = re.compile(r"\\(?:x\{([1-9A-Fa-f][0-9A-Fa-f]{1,5})\})?")
_SPECIAL: Final = frozenset((0x20, 0x2B, 0x3D, 0x5C))
"""The ASCII characters that escapes may stand for, but for controls, which no address has."""

_NOT_UNITEXT: Final = re.compile(r"[\x00- +=\\\x7f]")
_NOT_XTEXT: Final = re.compile(r"[^!-*,-<>-\[\]-~]")


def quote(address: str, *, ascii: bool) -> str:
    """Write a plain address in xtext if it must be `ascii`, else in unitext."""
    return _NOT_XTEXT.sub(_escape, address) if ascii else _NOT_UNITEXT.sub(_escape, address)


def unquote(text: str) -> str:
    """Read an address in any form. Raises `ValueError` if an escape is invalid or unprintable."""
    address = _ESCAPE.sub(_character, text)
    if not address.isprintable():
        raise ValueError("an address with a character that cannot be printed")
    return address


def requote(text: str, *, ascii: bool) -> str:
    """Write an address, in any form, for ORCPT; it stays as it is if it can stand there.

    Raises `ValueError` like `unquote`.
    """
    address = unquote(text)
    plain = text.replace("\\", "")
    if (_NOT_XTEXT.search(plain) if ascii else _NOT_UNITEXT.search(plain)) is None:
        return text
    return quote(address, ascii=ascii)


def _escape(match: re.Match[str]) -> str:
    return f"\\x{{{ord(match[0]):02X}}}"


def _character(match: re.Match[str]) -> str:
    code = int(match[1], 16) if match[1] else 0
    if code in _SPECIAL or 0x80 <= code <= 0x10FFFF:
        return chr(code)
    raise ValueError("an escape that stands for no character")
