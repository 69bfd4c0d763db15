"""Parse and write the parameters of MAIL and RCPT, and the attributes of XCLIENT.

Parameters come from extensions: SIZE (RFC 1870), BODY (RFC 6152 and 3030), SMTPUTF8 (RFC 6531),
AUTH (RFC 4954), RET, ENVID, NOTIFY and ORCPT (RFC 3461 and 6533), REQUIRETLS (RFC 8689).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from mailerq.wire import smtp, unitext
from mailerq.wire.smtp import Reply

__all__ = [
    "RCPT_KEYWORDS",
    "XCLIENT_ATTRIBUTES",
    "MailParameters",
    "ParameterError",
    "RcptParameters",
    "decode_xtext",
    "dsn_parameters",
    "encode_xtext",
    "envelope_commands",
    "mail_keywords",
    "parse_xclient",
    "split_path",
]

ENVID_LIMIT: Final = 100
"""Characters of an envelope id, decoded (RFC 3461, section 4.4)."""

ORCPT_LIMIT: Final = 500
"""Bytes of ORCPT with its type, as it is sent (RFC 3461, section 4.2)."""

SIZE_DIGITS: Final = 20
"""Digits of a SIZE (RFC 1870, section 4)."""

RCPT_KEYWORDS: Final = frozenset(("NOTIFY", "ORCPT"))

XCLIENT_ATTRIBUTES: Final = (
    "NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT",
)  # fmt: skip
"""The facts about a client that a proxy may give, as defined by Postfix."""


class ParameterError(Exception):
    """A parameter cannot be used; `reply` is the answer."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


@dataclass(frozen=True, slots=True, kw_only=True)
class MailParameters:
    """The parameters of MAIL. `body` is 7BIT, 8BITMIME or BINARYMIME."""

    size: int = 0
    body: str = "7BIT"
    utf8: bool = False
    require_tls: bool = False
    ret: str | None = None
    envid: str | None = None

    @classmethod
    def parse(cls, text: str, offered: Collection[str]) -> MailParameters:
        """Parse the text after the path. Raises `ParameterError`: 555 if not `offered`."""
        if not text:
            return NO_MAIL_PARAMETERS
        values = _split(text, offered)
        body = (values.get("BODY") or "7BIT").upper()
        if body not in ("7BIT", "8BITMIME", "BINARYMIME"):
            raise ParameterError(smtp.BAD_PARAMETER_VALUE)
        if body == "BINARYMIME" and "BINARYMIME" not in offered:
            raise ParameterError(smtp.UNKNOWN_PARAMETER)
        ret = values.get("RET")
        if ret is not None and ret.upper() not in _RET:
            raise ParameterError(smtp.BAD_PARAMETER_VALUE)
        envid = values.get("ENVID")
        if envid is not None:
            envid = decode_xtext(envid)
            if not 0 < len(envid) <= ENVID_LIMIT:
                raise ParameterError(smtp.BAD_PARAMETER_VALUE)
        return cls(
            size=_size(values.get("SIZE", "0")),
            body=body,
            utf8="SMTPUTF8" in values,
            require_tls="REQUIRETLS" in values,
            ret=ret and ret.upper(),
            envid=envid,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RcptParameters:
    """The parameters of RCPT. `orcpt` is ``type;address``, decoded from xtext.

    An address of the type ``utf-8`` keeps its form, see `mailerq.wire.unitext`.
    """

    notify: tuple[str, ...] = ()
    orcpt: str | None = None

    @classmethod
    def parse(cls, text: str, offered: Collection[str], *, utf8: bool = False) -> RcptParameters:
        """Parse the text after the path. Raises `ParameterError`: 555 if not `offered`.

        `utf8`: MAIL had SMTPUTF8, so ORCPT may have characters beside ASCII.
        """
        if not text:
            return NO_RCPT_PARAMETERS
        values = _split(text, offered)
        notify: tuple[str, ...] = ()
        if given := values.get("NOTIFY"):
            notify = tuple(given.upper().split(","))
            never_with_others = "NEVER" in notify and len(notify) > 1
            if never_with_others or len(set(notify)) < len(notify) or set(notify) - _NOTIFY:
                raise ParameterError(smtp.BAD_PARAMETER_VALUE)
        orcpt = values.get("ORCPT")
        if orcpt is not None:
            if len(orcpt.encode()) > ORCPT_LIMIT:
                raise ParameterError(smtp.BAD_PARAMETER_VALUE)
            kind, separator, address = orcpt.partition(";")
            address = _original(kind, address, utf8)
            if not separator or not _ATOM(kind) or not address:
                raise ParameterError(smtp.BAD_PARAMETER_VALUE)
            orcpt = f"{kind};{address}"
        return cls(notify=notify, orcpt=orcpt)


NO_MAIL_PARAMETERS: Final = MailParameters()
NO_RCPT_PARAMETERS: Final = RcptParameters()

_NOTIFY: Final = frozenset(("NEVER", "SUCCESS", "FAILURE", "DELAY"))
_FLAGS: Final = frozenset(("SMTPUTF8", "REQUIRETLS"))
_ATOM: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+").fullmatch
_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*").fullmatch
_HEX: Final = re.compile(r"\+([0-9A-F]{2})")
_NOT_XTEXT: Final = re.compile(r"[^!-*,-<>-~]")
_RET: Final = ("FULL", "HDRS")


def _split(text: str, offered: Collection[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for word in _words(text):
        keyword, _, value = word.partition("=")
        keyword = keyword.upper()
        if keyword not in offered:
            raise ParameterError(smtp.UNKNOWN_PARAMETER)
        if keyword in values or bool(value) == (keyword in _FLAGS):
            raise ParameterError(smtp.BAD_PARAMETER_VALUE)
        values[keyword] = value
    return values


def _words(text: str) -> list[str]:
    """Split text at spaces. Other blanks do not separate (RFC 5321, section 4.1.2)."""
    if not text.isprintable():
        raise ParameterError(smtp.BAD_PARAMETER_VALUE)
    return [word for word in text.split(" ") if word]


def _size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > SIZE_DIGITS:
        raise ParameterError(smtp.BAD_PARAMETER_VALUE)
    return int(text)


def _original(kind: str, address: str, utf8: bool) -> str:
    """The address of ORCPT, as the property has it."""
    if kind.lower() != unitext.KIND:
        return decode_xtext(address)
    if address.isascii():
        address = decode_xtext(address)  # RFC 5337 had xtext around it
    elif not utf8 or not {"+", "="}.isdisjoint(address):
        raise ParameterError(smtp.BAD_PARAMETER_VALUE)
    try:
        unitext.unquote(address)
    except ValueError:
        raise ParameterError(smtp.BAD_PARAMETER_VALUE) from None
    return address


def decode_xtext(text: str) -> str:
    """Decode xtext (RFC 3461, section 4). The result must be printable ASCII."""
    if not _XTEXT(text):
        raise ParameterError(smtp.BAD_PARAMETER_VALUE)
    decoded = _HEX.sub(lambda match: chr(int(match[1], 16)), text)
    if not decoded.isascii() or not decoded.isprintable():
        raise ParameterError(smtp.BAD_PARAMETER_VALUE)
    return decoded


def encode_xtext(text: str) -> str:
    """Encode ASCII text as xtext, for `decode_xtext`."""
    return _NOT_XTEXT.sub(lambda match: f"+{ord(match[0]):02X}", text)


def dsn_parameters(dsn: Mapping[str, object], *, utf8: bool = True) -> tuple[str, str]:
    """Make the parameters of MAIL and RCPT from the property ``dsn``, each after a space.

    `utf8`: MAIL has SMTPUTF8. The property is not trusted: invalid values are left out.
    """
    mail = rcpt = ""
    ret, envid = dsn.get("ret"), dsn.get("envid")
    if isinstance(ret, str) and ret.upper() in _RET:
        mail += f" RET={ret.upper()}"
    if isinstance(envid, str) and envid.isascii() and 0 < len(envid) <= ENVID_LIMIT:
        mail += f" ENVID={encode_xtext(envid)}"
    notify, orcpt = dsn.get("notify"), dsn.get("orcpt")
    if isinstance(notify, str):
        events = notify.upper().replace(" ", "").split(",")
        if not set(events) - _NOTIFY and ("NEVER" not in events or len(events) == 1):
            rcpt += f" NOTIFY={','.join(events)}"
    if isinstance(orcpt, str) and len(orcpt) <= ORCPT_LIMIT:
        kind, _, address = orcpt.partition(";")
        encoded = _encoded_original(kind, address, utf8)
        if encoded and _ATOM(kind):
            rcpt += f" ORCPT={kind};{encoded}"
    return mail, rcpt


def _encoded_original(kind: str, address: str, utf8: bool) -> str:
    """The address for ORCPT; empty if there is no form of it that can stand there."""
    if kind.lower() != unitext.KIND:
        return encode_xtext(address) if address.isascii() else ""
    try:
        encoded = unitext.requote(address, ascii=not utf8)
    except ValueError:
        return ""
    return encoded if len(f"{kind};{encoded}".encode()) <= ORCPT_LIMIT else ""


def envelope_commands(
    envelope: str,
    recipient: str,
    size: int | None,
    body: str,
    extensions: Mapping[str, str],
    dsn: Mapping[str, object] | None,
    *,
    utf8: bool,
    require_tls: bool,
) -> tuple[bytes, bytes]:
    r"""The lines of MAIL and RCPT, to a server that offers `extensions`.

    `body` is BINARYMIME for a server that takes that, 8BITMIME for a mail that is not ASCII, else
    empty.

    >>> envelope_commands("a@b.test", "c@d.test", 9, "", {}, None, utf8=False, require_tls=True)
    (b'MAIL FROM:<a@b.test> SIZE=9 REQUIRETLS\r\n', b'RCPT TO:<c@d.test>\r\n')
    """
    mail = f" SIZE={size}" if size is not None else ""
    if body and (body != "8BITMIME" or body in extensions):
        mail += f" BODY={body}"
    if utf8:
        mail += " SMTPUTF8"
    if require_tls:
        mail += " REQUIRETLS"
    rcpt = ""
    if dsn and "DSN" in extensions:
        more, rcpt = dsn_parameters(dsn, utf8=utf8)
        mail += more
    return f"MAIL FROM:<{envelope}>{mail}\r\n".encode(), f"RCPT TO:<{recipient}>{rcpt}\r\n".encode()


_BASIC_MAIL_KEYWORDS: Final = frozenset(("SIZE", "BODY"))
_MAIL_KEYWORDS: Final = _BASIC_MAIL_KEYWORDS | {"BINARYMIME", "SMTPUTF8", "AUTH"}
_DSN_KEYWORDS: Final = frozenset(("RET", "ENVID"))


@lru_cache(maxsize=8)
def mail_keywords(*, extended: bool, secure: bool, dsn: bool) -> frozenset[str]:
    """Return the keywords that MAIL may use."""
    if not extended:
        return _BASIC_MAIL_KEYWORDS
    keywords = _MAIL_KEYWORDS | {"REQUIRETLS"} if secure else _MAIL_KEYWORDS
    return keywords | _DSN_KEYWORDS if dsn else keywords


# A quoted local part may hold ">". No two parts match the same byte, so there is no backtracking.
_PATH: Final = re.compile(r'\ ?(<(?:"(?:[^"\\]|\\.)*"|[^">])*>)(?:\ ++(.*))?', re.DOTALL)


def split_path(argument: str, keyword: str) -> tuple[str, str] | None:
    """Split ``FROM:<path> parameters``. A space before the path is accepted, as is common."""
    if argument[: len(keyword)].upper() != keyword:
        return None
    match = _PATH.fullmatch(argument, len(keyword))
    return (match[1], match[2] or "") if match else None


def parse_xclient(text: str) -> dict[str, str | None]:
    """Parse the attributes of XCLIENT; unknown values become None. Raises `ParameterError`."""
    attributes: dict[str, str | None] = {}
    for word in _words(text):
        name, separator, value = word.partition("=")
        if name.upper() not in XCLIENT_ATTRIBUTES or not separator:
            raise ParameterError(smtp.BAD_PARAMETER_VALUE)
        value = decode_xtext(value)
        unknown = value.upper() in ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
        attributes[name.upper()] = None if unknown else value
    if not attributes:
        raise ParameterError(smtp.BAD_PARAMETER_VALUE)
    return attributes
