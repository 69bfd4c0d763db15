"""Signing stops nobody, whatever the mail is like, and signed mail arrives from client to peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.lag_kit import Meter, no_turn_above
from tests.engine.test_loop_lag import LONGEST_TURN, MB, pass_through, repeated
from tests.signing_kit import Keys, ed25519_pem, rsa_pem

FROM = b"From: a@example.com\r\n"
LINE = b"<td>  a cell of a table \t </td> \r\n"

MAILS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a long body": (repeated(LINE, 80 * MB, FROM + b"\r\n"), {}),
    "a body that is hashed once": (repeated(LINE, 8 * MB - 4096, FROM + b"\r\n"), {}),
    "empty lines": (repeated(b"\r\n", 40 * MB, FROM + b"\r\n", b"x\r\n"), {}),
    "many fields to sign": (repeated(b"To:\r\n", 900_000, FROM, b"\r\nx\r\n"), {}),
    "many names": (
        lambda: iter(
            [FROM, b"".join(b"%x:\r\n" % number for number in range(120_000)), b"\r\nx\r\n"]
        ),
        {},
    ),
    "a long From": (repeated(b"a, ", 900_000, b"From: ", b"a@example.com\r\n\r\nx\r\n"), {}),
    "many recipients": (repeated(LINE, 20_000, FROM + b"\r\n"), {"recipients": 300}),
    "a long body that is converted": (
        repeated(b"\xe9 text \r\n", 20 * MB, FROM + b"\r\n"),
        {"eight_bit": False},
    ),
}


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", MAILS)
async def test_a_mail_that_is_slow_to_sign_stops_nobody(tmp_path: Path, name: str) -> Meter:
    keys = Keys(tmp_path / "dkim")
    keys.directory.mkdir()
    for selector, pem in (("r", rsa_pem()), ("e", ed25519_pem())):
        keys.add("example.com", selector, pem)
    text = '[[key]]\ndomain = "example.com"\nheaders = ["a", "b", "c"]\n'
    text += 'canonicalization = "relaxed/relaxed"\n'
    (tmp_path / "dkim.toml").write_text(text)
    pieces, options = MAILS[name]
    return await pass_through(
        tmp_path,
        pieces,
        b"250",
        dkim_directory=str(keys.directory),
        dkim_file=str(tmp_path / "dkim.toml"),
        **options,
    )
