"""Who may open a connection: the slots of the way out, and who waits for one.

Theory of operation
-------------------
A connection to another host has a slot from its opening to its end. A flow that finds none waits
in a line; what becomes free goes to the first in the line, one slot at a time, so that all flows
take turns. An idle connection is closed for a flow that begins to wait, and while anybody waits
(`contended`) sessions end instead of becoming idle.

A host that never answers keeps its slot until the timeout. So connections of flows that nobody
has let in yet are *tries*: there are at most `TRY_SHARE` of the slots of them at a time, and
`SITE_TRIES` to one site. A flow that finds no try waits in a line as well.

Everything here runs on the home worker; slots may be released on any thread.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from mailerq.net.slots import Slots

if TYPE_CHECKING:
    from mailerq.net.worker import Worker
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.session import Session

__all__ = ["Openings"]

TRY_SHARE: Final = 4
"""One slot of so many may be in use for hosts that have not answered yet."""

SITE_TRIES: Final = 2
"""Such connections to one site at a time."""


class Openings:
    """The right to open connections, of all deliveries of an engine."""

    def __init__(self, slots: Slots, worker: Worker) -> None:
        self.slots = slots
        self.tries = 0
        self._worker = worker
        self._line: OrderedDict[Flow, None] = OrderedDict()
        self._try_line: OrderedDict[Flow, None] = OrderedDict()
        self._idle: OrderedDict[Session, None] = OrderedDict()
        self._turn: Flow | None = None
        self._serving = False
        outermost = slots
        while outermost.within is not None:
            outermost = outermost.within
        outermost.on_release = self._slot_came

    @property
    def contended(self) -> bool:
        """Whether flows wait for a slot."""
        return bool(self._line)

    def take(self, flow: Flow) -> bool:
        """A slot for one more connection of a flow; without one the flow waits for its turn."""
        if not flow.proven and not self.reserve_try(flow):
            return False
        if (self._line and self._turn is not flow) or not self.slots.take():
            self._line.setdefault(flow)
            self._close_idle()
            return False
        self._turn = None
        self._line.pop(flow, None)
        return True

    def release(self) -> None:
        """A connection has ended."""
        self.slots.release()

    def _slot_came(self) -> None:
        if self._line:
            self._worker.call(self._serve_line)

    def _serve_line(self) -> None:
        """Give each flow that waits its turn, for as many slots as there are."""
        if self._serving:
            return
        self._serving = True
        try:
            while self._line and self.slots.available:
                flow = self._turn = self._line.popitem(last=False)[0]
                flow.resume()
                self._turn = None
        finally:
            self._turn = None
            self._serving = False

    # Tries

    def reserve_try(self, flow: Flow) -> bool:
        """The right to find out whether a flow's site answers; else the flow waits for it."""
        if flow.reserved:
            return True
        site = flow.site
        if site.trying >= SITE_TRIES:
            site.blocked.setdefault(flow)
            return False
        if self.tries >= max(self.slots.limit // TRY_SHARE, 1):
            self._try_line.setdefault(flow)
            return False
        site.blocked.pop(flow, None)
        self._try_line.pop(flow, None)
        flow.reserved = True
        site.trying += 1
        self.tries += 1
        return True

    def end_try(self, flow: Flow) -> None:
        """A try is over, whatever came of it: the next one may begin."""
        site = flow.site
        site.trying -= 1
        self.tries -= 1
        while site.blocked and site.trying < SITE_TRIES:
            site.blocked.popitem(last=False)[0].resume()
        while self._try_line and self.tries < max(self.slots.limit // TRY_SHARE, 1):
            self._try_line.popitem(last=False)[0].resume()

    # Idle sessions

    def idle(self, session: Session) -> None:
        """A session has nothing to do, and may be ended for a flow that waits."""
        self._idle[session] = None

    def busy(self, session: Session) -> None:
        """A session is idle no more."""
        self._idle.pop(session, None)

    def _close_idle(self) -> None:
        if self._idle:
            self._idle.popitem(last=False)[0].leave()

    def forget(self, flow: Flow) -> None:
        """A flow needs nothing any more."""
        self._line.pop(flow, None)
        self._try_line.pop(flow, None)
        flow.site.blocked.pop(flow, None)
        if flow.reserved:
            flow.reserved = False
            self.end_try(flow)
