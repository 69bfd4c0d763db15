"""The snapshot of settings: what a reload changes, and what it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import SETTINGS, Config
from mailerq.errors import ConfigError
from mailerq.live import Live

FIXED = {setting.attribute for setting in SETTINGS if setting.fixed}


def test_what_is_fixed_keeps_its_value_and_is_named_with_both() -> None:
    live = Live(Config(smtp_port=(25,), smtp_maxsize=1000))
    plan = live.plan(Config(smtp_port=(2525,), smtp_maxsize=2000))
    assert plan.snapshot.config == Config(smtp_port=(25,), smtp_maxsize=2000)
    assert [str(change) for change in plan.pending] == ["smtp-port: 25 -> 2525 (program)"]
    assert [str(change) for change in plan.changed] == ["smtp-maxsize: 1000 -> 2000 (program)"]


def test_a_change_says_what_an_empty_value_stands_for_and_no_secret() -> None:
    live = Live(Config(smarthost="relay.test"))
    plan = live.plan(Config(smtp_username="ann", smtp_password="s3cret"))
    assert [str(change) for change in plan.changed] == [
        "smtp-username: (none) -> ann (program)",
        "smtp-password: (none) -> (hidden) (program)",
        "smarthost: relay.test -> (none) (default)",
    ]


def test_a_value_keeps_the_place_that_it_is_from() -> None:
    before = Config.load(["--smtp-port=25", "--smtp-maxsize=1000"], {}, ())
    after = Config.load(["--smtp-maxsize=2000"], {"MAILERQ_SMTP_PORT": "26"}, ())
    config = Live(before).plan(after).snapshot.config
    assert config.origin("smtp-port") == "--smtp-port"
    assert config.origin("smtp-maxsize") == "--smtp-maxsize"
    assert config.origin("smarthost") == "default"


def test_settings_may_contradict_what_cannot_change() -> None:
    live = Live(Config(smtp_secure_port=(465,), smtp_certificate="/mx.pem"))
    with pytest.raises(ConfigError, match="smtp-certificate"):
        live.plan(Config())
    assert live.current.number == 1


def test_each_snapshot_has_a_number_of_its_own() -> None:
    live = Live(Config())
    for number in (2, 3):
        live.exchange(live.plan(live.current.config).snapshot)
        assert live.current.number == number
    assert live.plan(Config(), 7).snapshot.number == 7


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "smtp_port": st.sampled_from([(25,), (26,)]),
        "smtp_secure_port": st.sampled_from([(), (465,)]),
        "smtp_certificate": st.sampled_from(["", "/mx.pem"]),
        "rabbitmq_outbox": st.sampled_from(["outbox", "results"]),
        "rabbitmq_results": st.sampled_from(["", "results", "outbox"]),
        "smtp_connections": st.sampled_from([1, 10]),
        "smtp_connections_in": st.sampled_from([None, 5]),
        "max_attempts": st.integers(0, 3),
    },
)


@given(st.lists(VALUES, max_size=8))
def test_after_any_sequence_the_last_settings_that_could_be_are_in_force(
    sequence: list[dict[str, object]],
) -> None:
    first = Config()
    live = Live(first)
    expected, number = first, 1
    for values in sequence:
        try:
            config = Config(**values)  # type: ignore[arg-type]
            wanted = config.replace(**{name: getattr(first, name) for name in FIXED})
        except ConfigError:
            wanted = None
        try:
            live.exchange(live.plan(Config(**values)).snapshot)  # type: ignore[arg-type]
        except ConfigError:
            assert wanted is None
        else:
            assert wanted is not None
            expected, number = wanted, number + 1
        assert live.current.config == expected
        assert live.current.number == number
