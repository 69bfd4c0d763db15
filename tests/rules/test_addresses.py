"""Lists of addresses that anybody may send to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.rules.access import Access
from mailerq.rules.addresses import AddressList

ROUTED = [
    "v%ext.test@wild.test",
    "ext.test!v@wild.test",
    '"v@ext.test"@wild.test',
    '"v%e"@wild.test',
]


@pytest.mark.parametrize("entry", ["*@wild.test", "?*@wild.test", "/.*/", r"/.*@wild\.test/"])
@pytest.mark.parametrize("recipient", ROUTED)
def test_a_pattern_takes_no_address_that_hides_a_route(entry: str, recipient: str) -> None:
    assert AddressList.parse(entry).has("v@wild.test")
    assert not AddressList.parse(entry).has(recipient)


@pytest.mark.parametrize("recipient", ROUTED)
def test_an_exact_entry_takes_what_it_names(recipient: str) -> None:
    addresses = AddressList.parse(f"*@wild.test\n{recipient}\n")
    assert addresses.has(recipient.upper())
    assert not addresses.has(f"x{recipient}" if recipient[0] != '"' else f'"x{recipient[1:]}')


@given(st.text('ab%!@"\\.', min_size=1, max_size=12))
def test_patterns_and_local_domains_agree_on_hidden_routes(local: str) -> None:
    recipient = f"{local}@wild.test"
    listed = AddressList.parse("*@wild.test").has(recipient)
    assert listed == Access((), (), ["wild.test"]).is_in_local_domain(recipient)
