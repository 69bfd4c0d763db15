"""The right to open connections: outgoing slots, and the flows that wait for one.

Theory of operation
-------------------
A connection to another host holds a slot from its opening to its end. A flow without a slot waits
in line. A free slot goes to one flow, so that all flows take turns. Flows that no host has let in
yet have a line of their own, which gets every second slot: fresh mail for a new destination does
not wait until thousands of slow destinations have had a turn. When a flow begins to wait, an idle
connection is closed, and the flow keeps its mail in memory: the slot comes soon. While flows wait
(`contended`), sessions end instead of becoming idle, and other sessions after their share.

A host that never answers keeps its slot until the timeout. So connections of flows that no host has
let in yet are *tries*, at most `SITE_TRIES` to one site. A try is *quick* at first. Without an
answer within `QUICK_SECONDS` the try becomes *patient*, and lasts until the timeout. Time in which
this process stands still does not count: it says nothing about the host. Each kind may use
1/`TRY_SHARE` of the slots and of the messages in memory. At the limit of patient tries the try is
put off, and the flow waits in line for a patient one. So silent hosts, however many, do not hold up
tries of live hosts for long. Flows wait for a slot with mail in memory; for a try they wait as
pauses (`mailerq.outbound.pause`). Among pauses that wait for a quick try, the newest and the oldest
take turns.

Everything here runs on the home worker; slots may be released on any thread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final

from mailerq.net.slots import Slots
from mailerq.outbound.pause import Pause

if TYPE_CHECKING:
    from mailerq.net.worker import Worker
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.session import Session

__all__ = ["Openings"]

TRY_SHARE: Final = 4
"""Each kind of try may use one slot, and one message in memory, in `TRY_SHARE`."""

QUICK_SECONDS: Final = 0.5
"""How long a try is quick."""

SITE_TRIES: Final = 2
"""Tries to one site at a time."""


class Openings:
    """Grants connections to all deliveries of an engine."""

    def __init__(self, slots: Slots, worker: Worker) -> None:
        self.slots = slots
        self.messages = 1 << 20
        """Messages in memory; each try has one, and tries leave memory to other mail."""
        self._worker = worker
        # The flows that wait for a slot, and whether an idle connection ends for each.
        self._line: OrderedDict[Flow, bool] = OrderedDict()
        self._new_line: OrderedDict[Flow, bool] = OrderedDict()
        self._is_for_new = False
        self._quick = self._patient = 0
        self._reserved = 0  # of these tries, those without a connection yet
        self._trying: dict[bytes, int] = {}
        """Connections being opened to each site, which may never answer."""
        # A pause may leave a line; its place there is skipped.
        self._quick_line: deque[Pause] = deque()
        self._patient_line: deque[Pause] = deque()
        self._site_lines: dict[bytes, deque[Pause]] = {}
        self._newest = True
        self._idle: OrderedDict[Session, None] = OrderedDict()
        self._turn: Flow | None = None
        self._serving = False
        outermost = slots
        while outermost.within is not None:
            outermost = outermost.within
        outermost.on_release = self._slot_came

    @property
    def _most_tries(self) -> int:
        return max(int(min(self.slots.limit, self.messages)) // TRY_SHARE, 1)

    def free_slots(self, reserved: int = 0) -> int:
        """Slots that nobody waits for or is about to take, with those of idle connections.

        `reserved` is the number of tries that have not begun and whose slots count as free.
        """
        left = 0 if self.contended else int(min(self.slots.left, 1 << 20))
        return max(left + len(self._idle) - self._reserved + reserved, 0)

    @property
    def free_tries(self) -> int:
        """How many more connections to hosts that have not let us in yet may begin now."""
        return min(self.free_slots(), max(self._most_tries - self._quick, 0))

    @property
    def few_tries(self) -> int:
        """Below this number of free tries, most are in use."""
        return max(self._most_tries // TRY_SHARE, 1)

    @property
    def waiting(self) -> int:
        """Flows that wait for a slot."""
        return len(self._line) + len(self._new_line)

    @property
    def beginners(self) -> int:
        """Flows that no host has let in yet, and that try or wait for a slot."""
        return len(self._new_line) + self._quick + self._patient

    @property
    def contended(self) -> bool:
        """Whether flows wait for a slot."""
        return bool(self._line or self._new_line)

    @property
    def are_wanted(self) -> bool:
        """Whether flows wait for a slot, or soon will: a try may begin, and no slot is free."""
        return self.contended or (self._reserved > 0 and not self.slots.available)

    def take(self, flow: Flow) -> bool:
        """Take a slot for one more connection; without one the flow waits for its turn."""
        if (self.contended and self._turn is not flow) or not self.slots.take():
            line = self._line if flow.proven else self._new_line
            if self.awaits(flow):  # it keeps its place if it is let in meanwhile
                line = self._line if flow in self._line else self._new_line
            if not line.get(flow):
                line[flow] = self._close_idle()
            return False
        self._turn = None
        self._leave_line(flow)
        return True

    def awaits(self, flow: Flow) -> bool:
        """Whether a flow waits for a slot."""
        return flow in self._line or flow in self._new_line

    def gets_slot(self, flow: Flow) -> bool:
        """Whether an idle connection ends for a flow that waits for a slot."""
        return self._line.get(flow, False) or self._new_line.get(flow, False)

    def _leave_line(self, flow: Flow) -> None:
        self._line.pop(flow, None)
        self._new_line.pop(flow, None)

    def release(self) -> None:
        """A connection has ended."""
        self.slots.release()

    def serve(self) -> None:
        """There may be more slots now, and more tries."""
        self._serve_line()
        self._serve_tries()

    def _slot_came(self) -> None:
        if self.contended:
            self._worker.call(self._serve_line)

    def _serve_line(self) -> None:
        """Serve waiting flows in turn while there are free slots."""
        if self._serving:
            return
        self._serving = True
        try:
            while self.contended and self.slots.available:
                self._is_for_new = not self._is_for_new
                line = self._new_line if self._is_for_new else self._line
                line = line or self._new_line or self._line
                flow = self._turn = line.popitem(last=False)[0]
                flow.resume()
                self._turn = None
        finally:
            self._turn = None
            self._serving = False

    # Tries

    def reserve_try(self, flow: Flow | Pause) -> bool:
        """Reserve the right to try a flow's site; without it a pause waits in line."""
        if flow.reserved:
            return True
        key = flow.site_key
        line = self._line_for(flow)
        if line is not None:
            if isinstance(flow, Pause) and flow.line is not line:
                flow.line = line
                line.append(flow)
            return False
        if flow.patient:
            self._patient += 1
        else:
            self._quick += 1
        self._trying[key] = self._trying.get(key, 0) + 1
        if isinstance(flow, Pause):
            flow.line = None
        flow.reserved = True
        self._reserved += 1
        return True

    def use_try(self, flow: Flow) -> bool:
        """A session begins; return whether that is the try that the flow has reserved."""
        was_reserved, flow.reserved = flow.reserved, False
        self._reserved -= was_reserved
        return was_reserved

    def _line_for(self, flow: Flow | Pause) -> deque[Pause] | None:
        """The line to wait in; None if the flow may try."""
        if self._trying.get(flow.site_key, 0) >= SITE_TRIES:
            return self._site_lines.setdefault(flow.site_key, deque())
        if flow.patient:
            return self._patient_line if self._patient >= self._most_tries else None
        return self._quick_line if self._quick >= self._most_tries else None

    def overdue(self, session: Session) -> None:
        """A quick try has had no answer: make it patient, or put it off."""
        if self._patient < self._most_tries:
            session.patient = True
            self._patient += 1
            self._quick -= 1
            self._serve_tries()
        else:
            session.flow.put_off(session)

    def end_try(self, flow: Flow | Pause, *, patient: bool) -> None:
        """A try has ended, with any outcome: the next may begin."""
        if patient:
            self._patient -= 1
        else:
            self._quick -= 1
        key = flow.site_key
        self._trying[key] -= 1
        line = self._site_lines.get(key)
        while line and self._trying[key] < SITE_TRIES:
            self._resume(line, line.popleft())
        if not line:
            self._site_lines.pop(key, None)
        if not self._trying[key]:
            del self._trying[key]
        self._serve_tries()

    def _serve_tries(self) -> None:
        while self._patient_line and self._patient < self._most_tries:
            self._resume(self._patient_line, self._patient_line.popleft())
        while self._quick_line and self._quick < self._most_tries:
            self._newest = not self._newest
            line = self._quick_line
            self._resume(line, line.pop() if self._newest else line.popleft())

    def _resume(self, line: deque[Pause], pause: Pause) -> None:
        """Let a pause try that has come to the end of a line, unless it has left the line."""
        if pause.line is line:
            pause.line = None
            pause.resume()

    def tidy(self) -> None:
        """Drop the places of pauses that have left their line."""
        for line in (self._quick_line, self._patient_line, *self._site_lines.values()):
            there = [pause for pause in line if pause.line is line]
            line.clear()
            line.extend(there)

    # Idle sessions

    def idle(self, session: Session) -> None:
        """An idle session may be ended for a flow that waits."""
        self._idle[session] = None

    def busy(self, session: Session) -> None:
        """A session is no longer idle."""
        self._idle.pop(session, None)

    def _close_idle(self) -> bool:
        if not self._idle:
            return False
        self._idle.popitem(last=False)[0].leave()
        return True

    def forget(self, flow: Flow | Pause) -> None:
        """Drop a flow from all lines."""
        if isinstance(flow, Pause):
            flow.line = None
        else:
            self._leave_line(flow)
        if flow.reserved:
            flow.reserved = False
            self._reserved -= 1
            self.end_try(flow, patient=flow.patient)
