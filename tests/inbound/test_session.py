"""The table of events and their handlers in an incoming session."""

from __future__ import annotations

import inspect
from typing import get_args

from mailerq.inbound import session
from mailerq.wire import events, server


def test_every_event_of_the_protocol_has_one_handler() -> None:
    assert session._HANDLERS.keys() == set(get_args(server.Event))


def test_every_class_of_events_is_an_event() -> None:
    classes = (each for _, each in inspect.getmembers(events, inspect.isclass))
    made = {each for each in classes if each.__module__ == events.__name__}
    assert made == set(get_args(server.Event))
