"""What deliveries cannot keep is said, and never quietly broken."""

from __future__ import annotations

from typing import Any

import pytest

from mailerq.rules.routes import unmet_promise


@pytest.mark.parametrize(
    ("properties", "body", "status"),
    [
        ({}, b"a\r\n", None),
        ({"requiretls": True}, b"a\r\n", "5.7.30"),
        ({"security": "required"}, b"a\r\n", "5.7.10"),
        ({"security": "verified"}, b"a\r\n", "5.7.10"),
        ({"security": "opportunistic"}, b"a\r\n", None),
        ({"binarymime": True}, b"only lines\r\n", None),
        ({"binarymime": True}, b"bare\nnewline\r\n", "5.6.3"),
        ({"binarymime": True}, b"bare\rreturn\r\n", "5.6.3"),
        ({"binarymime": True}, b"nul\0\r\n", "5.6.3"),
        ({"binarymime": True}, None, None),
    ],
)
def test_a_promise_that_cannot_be_kept_has_a_status(
    properties: dict[str, Any], body: bytes | None, status: str | None
) -> None:
    reply = unmet_promise(properties, body)
    assert (reply and reply.status) == status
