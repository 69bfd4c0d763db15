"""What follows from the replies of peers: for the message, and for other mail on the same way.

Theory of operation
-------------------
`mailerq.rules.answers` says what a reply means. For the message, that changes its outcome: a 5xx
may be tried again, a 4xx may be final, and the next attempt may have a time of its own.

For other mail, a reply acts on a scope: a site or a provider, from one local address. Each scope
that a pattern has acted on has a `Recovery` (`mailerq.rules.recovery`), and an `Action` that says
which pattern, since when and why. What a scope may do is a limit like others: `adjusted` lowers the
rates and the connections of `rules.shaping`, and a pause is a cell that is full until its end. So
mail that waits for a pause costs nothing, moves to another of its local addresses if there is one,
and is named by ``mailerq status``.

A reply about the number of messages of one connection is no reason for less mail: the connection
ends, and for `LEARNED_SECONDS` others to the site end after as many messages by themselves.

Actions are kept by `Kept`, so they hold in all processes and over restarts.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

from mailerq.escaping import escape
from mailerq.net.logs import Ration
from mailerq.outbound.limits import PAUSED
from mailerq.rules.normalised import Unclassified
from mailerq.rules.recovery import Recovery, Stage
from mailerq.rules.responses import Fate
from mailerq.rules.shaping import Bound
from mailerq.rules.triggers import Triggers

if TYPE_CHECKING:
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.jobs import Job, Report
    from mailerq.outbound.limits import Limits
    from mailerq.outbound.session import Session
    from mailerq.outbound.sites import Site
    from mailerq.rules.answers import Answers, Rule, Verdict
    from mailerq.rules.responses import Outcome
    from mailerq.rules.shaping import Bounds

__all__ = ["Action", "Kept", "Refusals", "Scope", "react"]

log = logging.getLogger("mailerq.delivery")

MAX_ACTIONS: Final = 10_000
"""Scopes that are acted on at a time; further ones are left alone."""

ALERTS_PER_MINUTE: Final = 10
"""Log lines about replies that an operator should see."""

MAX_RECIPIENTS: Final = 20_000
"""Recipients whose failures are counted, for patterns that suppress them after some."""

MAX_NAMED: Final = 20
"""Texts and actions in the statistics."""

MAX_SAMPLE: Final = 300
"""Characters of a reply that is kept or logged."""

LEARNED_SECONDS: Final = 3600.0
"""How long connections to a site end after the number of messages that it took on one."""

MAX_LEARNED: Final = 4096
"""Sites with such a number."""

OTHER_IP_SECONDS: Final = 1.0
"""When a message tries another of its local addresses."""

LEAST_SECONDS: Final = 0.05
"""The least time between two looks at what time has changed."""


class Scope(NamedTuple):
    """Mail to a site or a provider, from one local address or from any."""

    key: str
    """As `Limits` names it."""
    local_ip: str


class Action(msgspec.Struct, eq=False):
    """What a pattern has done to a scope. Times are seconds since 1970."""

    scope: Scope
    label: str
    """The scope, for people."""
    rule: str
    where: str
    since: float
    sample: str
    recovery: Recovery
    hits: int = 0

    @property
    def text(self) -> str:
        """The pattern and its place."""
        return f"{self.rule}, {self.where}"

    @property
    def until(self) -> float:
        """Until when there is a pause, or less mail goes at least."""
        recovery = self.recovery
        pause = recovery.until if recovery.stage is Stage.PAUSED else 0.0
        return max(pause, recovery.held)

    def extend(self, until: float, now: float) -> None:
        """Have the action last until another time: the pause, or what is left behind the pause."""
        recovery = self.recovery
        over = recovery.until <= now and recovery.until < recovery.held
        if recovery.stage is Stage.PAUSED and not over:
            recovery.until = until
        else:
            recovery.held = until


class Kept(Protocol):
    """Where actions are kept."""

    def keep(self, action: Action) -> None:
        """Keep a new action, or a changed one."""

    def drop(self, action: Action) -> None:
        """An action is over."""

    def suppress(self, recipient: str, rule: str, outcome: Outcome) -> None:
        """Send nothing to a recipient any more."""


class Refusals:
    """The reactions to replies, for all deliveries of an engine."""

    def __init__(
        self,
        answers: Answers,
        limits: Limits,
        kept: Kept | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.answers = answers
        self.unclassified = Unclassified()
        self.actions: dict[Scope, Action] = {}
        self._limits = limits
        self._kept = kept
        self._clock = clock
        self._triggers = Triggers()
        self._failures = Triggers(MAX_RECIPIENTS)
        self._classes: dict[str, int] = {}
        self._learned: dict[bytes, tuple[Bound, float]] = {}
        self._next = math.inf
        """When `advance` may have something to do; not later than that."""
        self._say_alert = Ration(log.warning, ALERTS_PER_MINUTE, "and %d more such replies")

    def change(self, answers: Answers) -> None:
        """Put other patterns in force. What they have begun goes on."""
        self.answers = answers
        self.unclassified.clear()

    # Replies

    def settled(
        self, flow: Flow, job: Job, report: Report, session: Session | None
    ) -> Report | None:
        """An attempt has ended; return the report with the consequences of its reply.

        None: the host is busy, and the attempt goes on with another one.
        """
        outcome = report.outcome
        if outcome.fate is Fate.DELIVERED:
            if self.actions:
                self._succeeded(flow)
            return report
        verdict = self.heard(flow, outcome, session, (report.messages or 1) - 1)
        if verdict is None:
            return report
        reaction = verdict.reaction
        if reaction.leave_host and session is not None and reaction.fate is not Fate.FAILED:
            if flow.may_pass_on(job, session):
                return None
        outcome = _judged(outcome, verdict, job, flow, is_first=(report.messages or 1) == 1)
        if outcome.fate is Fate.FAILED and verdict.reaction.suppress and self._kept is not None:
            rule = next(each for each in verdict.rules if each.reaction.suppress)
            key = (rule.name, job.recipient)
            if self._failures.met(key, rule.trigger, monotonic()):
                self._kept.suppress(job.recipient, rule.name, outcome)
        return msgspec.structs.replace(report, outcome=outcome)

    def heard(
        self, flow: Flow, outcome: Outcome, session: Session | None = None, messages: int = 0
    ) -> Verdict | None:
        """A peer has refused something: act on the mail that would go the same way.

        The session had so many `messages` before.
        """
        if not outcome.from_peer:
            return None
        provider = self._limits.provider_of(flow.site)
        verdict = self.answers.judge(outcome, provider)
        if verdict is None:
            self.unclassified.add(outcome.reply)
            return None
        if verdict.kind:
            self._classes[verdict.kind] = self._classes.get(verdict.kind, 0) + 1
        if verdict.reaction.reconnect and session is not None:
            session.leave()
            self._learn(flow, messages, verdict.rules[0])
        if verdict.reaction.leave_host and session is not None:
            flow.leave_host(session.remote, verdict.reaction.leave_host)
        for rule in verdict.rules:
            if rule.reaction.moves_the_flow or rule.reaction.alert:
                self._act(rule, flow, provider, outcome)
        about_a_message = not verdict.reaction.leave_host and not any(
            rule.reaction.moves_the_flow for rule in verdict.rules
        )
        if self.actions and about_a_message:
            self._succeeded(flow)
        return verdict

    def _learn(self, flow: Flow, messages: int, rule: Rule) -> None:
        """Connections to a site end after this number of messages."""
        if not messages:
            return
        self._learned.pop(flow.site.limit_key, None)
        if len(self._learned) >= MAX_LEARNED:
            del self._learned[next(iter(self._learned))]
        bound = Bound(messages, f"{rule.name}, {rule.where}")
        self._learned[flow.site.limit_key] = bound, monotonic() + LEARNED_SECONDS
        self._limits.number += 1

    def of_connection(self, bounds: Bounds, site: Site) -> Bounds:
        """The limits of each connection to a site, with what the site's replies have taught."""
        found = self._learned.get(site.limit_key)
        if found is None or found[1] < monotonic():
            return bounds
        known = bounds.get("connection-messages")
        if known is not None and known.value <= found[0].value:
            return bounds
        return {**bounds, "connection-messages": found[0]}

    def _scope(self, rule: Rule, flow: Flow, provider: str) -> tuple[Scope, str]:
        local_ip = flow.local_ip or ""
        if provider and rule.whole_provider:
            key, label = f"provider {provider}", provider
        else:
            key, label = f"site {flow.site.limit_key.hex()}", flow.site.label
        return Scope(key, local_ip), f"{label} from {local_ip}" if local_ip else label

    def _act(self, rule: Rule, flow: Flow, provider: str, outcome: Outcome) -> None:
        scope, label = self._scope(rule, flow, provider)
        now = self._clock()
        action = self.actions.get(scope)
        if action is not None and action.recovery.advance(now):
            self._changed(action)
            action = self.actions.get(scope)
        if action is not None and rule.reaction.moves_the_flow:
            action.hits += 1
        probing = action is not None and action.recovery.stage is Stage.PROBING
        met = self._triggers.met((rule.name, scope), rule.trigger, monotonic())
        if not (met or (probing and rule.reaction.pause)):
            return
        sample = outcome.reply[:MAX_SAMPLE]
        if rule.reaction.alert:
            self._say_alert("%s: %s answers %s", rule.name, label, escape(sample))
        if not rule.reaction.moves_the_flow:
            return
        if action is None:
            if len(self.actions) >= MAX_ACTIONS:
                return
            hits = rule.trigger.replies
            action = Action(scope, label, rule.name, rule.where, now, sample, Recovery(), hits)
        bounds = self._limits.bounds_of(flow.site, flow.local_ip, scope.key)
        most = bounds.get("max-connections")
        changed = action.recovery.refuse(
            rule.reaction,
            now,
            rated="messages-per-minute" in bounds,
            connections=self._open(flow, scope, provider),
            most=int(most.value) if most is not None else 0,
        )
        if not changed:
            return
        action.rule, action.where, action.sample = rule.name, rule.where, sample
        self.adopt(action)
        if self._kept is not None:
            self._kept.keep(action)
        log.info("%s: %s: %s", rule.name, label, _shown(action.recovery, now))

    def _open(self, flow: Flow, scope: Scope, provider: str) -> int:
        """Connections of a scope that are open, as far as this process knows."""
        if scope.key.startswith("site "):
            flows: Iterable[Flow] = flow.site.flows.values()
        else:
            flows = flow.beside
            flows = [each for each in flows if self._limits.provider_of(each.site) == provider]
        return sum(len(each.sessions) for each in flows if each.local_ip == flow.local_ip)

    def _succeeded(self, flow: Flow) -> None:
        """The peer has nothing against the way that a message took: more may go."""
        local_ip = flow.local_ip or ""
        keys = [f"site {flow.site.limit_key.hex()}"]
        if provider := self._limits.provider_of(flow.site):
            keys.append(f"provider {provider}")
        for key in keys:
            action = self.actions.get(Scope(key, local_ip))
            if action is not None and action.recovery.succeed(self._clock()):
                self._changed(action)

    # What flows may do

    def adjusted(self, bounds: Bounds, key: str, local_ip: str) -> Bounds:
        """The limits of a scope, as far as refusals lower them."""
        action = self.actions.get(Scope(key, local_ip))
        if action is None:
            return bounds
        recovery, found = action.recovery, dict(bounds)
        rate = found.get("messages-per-minute")
        per_minute = math.inf if rate is None else max(int(rate.value * recovery.share), 1)
        per_minute = min(per_minute, recovery.rate or math.inf)
        if per_minute != math.inf and (rate is None or per_minute < rate.value):
            found["messages-per-minute"] = Bound(per_minute, action.text)
        if recovery.connections is not None:
            most = found.get("max-connections")
            if most is None or recovery.connections < most.value:
                found["max-connections"] = Bound(recovery.connections, action.text)
        if recovery.stage is Stage.PAUSED:
            found[PAUSED] = Bound(recovery.until, action.text)
        return found

    def adopt(self, action: Action) -> None:
        """Put an action in force, in place of another one for its scope."""
        self.actions[action.scope] = action
        self._pause(action)
        self._changed(action)

    def _pause(self, action: Action) -> None:
        """Have the limits refuse the mail of a scope until its pause ends."""
        recovery = action.recovery
        seconds = recovery.until - self._clock()
        if recovery.stage is Stage.PAUSED and seconds > 0:
            self._limits.pause(recovery.until, *action.scope, seconds)

    def _changed(self, action: Action) -> None:
        """Tell those who wait."""
        over = action.recovery.stage is Stage.NORMAL
        if over:
            self.actions.pop(action.scope, None)
            if self._kept is not None:
                self._kept.drop(action)
        else:
            self._next = min(self._next, action.recovery.next_change)
        self._limits.ask_again(*action.scope)

    def advance(self) -> float:
        """Do what time alone does; return the seconds until that has to be done again."""
        now = self._clock()
        if now >= self._next:
            self._next = math.inf
            for action in list(self.actions.values()):
                if action.recovery.advance(now):
                    self._changed(action)
                elif action.recovery.stage is not Stage.NORMAL:
                    self._next = min(self._next, action.recovery.next_change)
        return max(self._next - now, LEAST_SECONDS)

    def cancel(self, scope: Scope) -> bool:
        """End an action, as an operator asks; return whether there was one."""
        action = self.actions.get(scope)
        if action is None:
            return False
        action.recovery.stage = Stage.NORMAL
        self._changed(action)
        return True

    # Seeing

    def statistics(self) -> dict[str, Any]:
        """How many replies of each class came, what is being done, and what no pattern matches."""
        now = self._clock()
        shown = {action.label: _shown(action.recovery, now) for action in self.actions.values()}
        return {
            "classes": dict(self._classes),
            "acted_on": len(self.actions),
            "actions": {
                f"{action.label} ({action.text})": shown[action.label]
                for action in list(self.actions.values())[:MAX_NAMED]
            },
            "unclassified": self.unclassified.most(MAX_NAMED),
        }

    def flush_log(self) -> None:
        """Log the count of suppressed lines."""
        self._say_alert.flush()


def react(limits: Limits, answers: Answers | None, kept: Kept | None = None) -> None:
    """React to replies of peers by these patterns; None: by their codes alone."""
    if answers is None:
        limits.refusals = None
    elif limits.refusals is None:
        limits.refusals = Refusals(answers, limits, kept)
    else:
        limits.refusals.change(answers)


def _judged(outcome: Outcome, verdict: Verdict, job: Job, flow: Flow, *, is_first: bool) -> Outcome:
    """The outcome with the consequences for its message."""
    reaction = verdict.reaction
    after, counted = reaction.retry_after, reaction.counted is not False
    if reaction.reconnect and is_first and not counted:
        after, counted = None, True  # what a connection had before is not the reason
    fate = reaction.fate or outcome.fate
    other_ip = bool(reaction.other_ip) and flow.has_other_ip(job)
    if other_ip:
        fate, after = Fate.RETRY, OTHER_IP_SECONDS
    return msgspec.structs.replace(
        outcome,
        fate=fate,
        retry_after=after,
        counted=counted,
        pins=not reaction.other_ip,
        other_ip=other_ip,
        kind=verdict.kind,
        rule=verdict.rules[0].name,
    )


def _shown(recovery: Recovery, now: float) -> str:
    """A state for people."""
    if recovery.stage is Stage.PAUSED:
        return f"paused for {max(recovery.until - now, 0):.0f} s"
    parts = []
    if recovery.rate is not None:
        parts.append(f"{recovery.rate} messages a minute")
    elif recovery.share < 1:
        parts.append(f"{recovery.share:.0%} of the rate")
    if recovery.connections is not None:
        parts.append(f"{recovery.connections} connections")
    return f"{recovery.stage}: {' and '.join(parts) or 'nothing is lowered'}"
