"""What deliveries cannot keep is said, and never quietly broken."""

from __future__ import annotations

from typing import Any

import pytest

from mailerq.rules.routes import unmet_promise


@pytest.mark.parametrize(
    ("properties", "status"),
    [
        ({}, None),
        ({"requiretls": True}, "5.7.30"),
        ({"security": "required"}, "5.7.10"),
        ({"security": "verified"}, "5.7.10"),
        ({"security": "opportunistic"}, None),
        ({"binarymime": True}, None),
    ],
)
def test_a_promise_that_cannot_be_kept_has_a_status(
    properties: dict[str, Any], status: str | None
) -> None:
    reply = unmet_promise(properties)
    assert (reply and reply.status) == status
