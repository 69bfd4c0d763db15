"""What each end of an attempt is called, and what follows from it."""

import errno
import socket

import pytest

from mailerq.rules import responses
from mailerq.rules.responses import Fate, Outcome
from mailerq.rules.row import Row
from mailerq.rules.security import Reason, TlsFailure
from mailerq.wire.client import Accepted, Failed, Problem, Refused, Step
from mailerq.wire.smtp import Reply


def words(outcome: Outcome) -> tuple[str, str, str, Fate]:
    return outcome.type, outcome.state, outcome.result, outcome.fate


def test_success() -> None:
    outcome = responses.accepted(Accepted(Reply(250, "2.0.0 Ok\n2.0.0 queued as 7")))
    assert words(outcome) == ("success", "accept", "accepted", Fate.DELIVERED)
    assert (outcome.code, outcome.status) == (250, "2.0.0")
    assert outcome.description == "Ok queued as 7"


@pytest.mark.parametrize(
    ("step", "state"),
    [
        (Step.MAILFROM, "mail from"),
        (Step.RCPTTO, "rcpt to"),
        (Step.DATA, "data"),
        (Step.MESSAGE, "received"),
    ],
)
@pytest.mark.parametrize(
    ("code", "fate"), [(421, Fate.RETRY), (499, Fate.RETRY), (500, Fate.FAILED)]
)
def test_a_refused_message(step: Step, state: str, code: int, fate: Fate) -> None:
    outcome = responses.refused(Refused(step, Reply(code, "no")))
    assert words(outcome) == ("error", state, "error", fate)
    assert (outcome.code, outcome.status, outcome.description) == (code, None, "no")


@pytest.mark.parametrize(
    ("step", "state"), [(Step.INTRO, "init"), (Step.EHLO, "ehlo"), (Step.HELO, "helo")]
)
@pytest.mark.parametrize("code", [421, 554])
def test_a_refused_session_says_nothing_of_the_message(step: Step, state: str, code: int) -> None:
    outcome = responses.refused(Refused(step, Reply(code, "no")))
    assert words(outcome) == ("noaccess", state, "error", Fate.RETRY)


@pytest.mark.parametrize(
    ("step", "problem", "expected"),
    [
        (Step.INTRO, Problem.LOST, ("noaccess", "init", "lost")),
        (Step.EHLO, Problem.TIMEOUT, ("noaccess", "ehlo", "timeout")),
        (Step.EHLO, Problem.OVERFLOW, ("overflow", "ehlo", "invalid")),
        (Step.MAILFROM, Problem.LOST, ("lost", "mail from", "lost")),
        (Step.DATA, Problem.TIMEOUT, ("timeout", "data", "timeout")),
        (Step.MESSAGE, Problem.INVALID, ("lost", "received", "invalid")),
        (Step.IDLE, Problem.LOST, ("idle", "idle", "lost")),
    ],
)
def test_a_broken_session_is_tried_again(
    step: Step, problem: Problem, expected: tuple[str, str, str]
) -> None:
    outcome = responses.failed(Failed(step, problem, "why"))
    assert words(outcome) == (*expected, Fate.RETRY)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ECONNREFUSED, ""), ("refused", "connect", "error", Fate.RETRY)),
        (OSError(errno.ETIMEDOUT, ""), ("connect", "connect", "timeout", Fate.RETRY)),
        (OSError(errno.EHOSTUNREACH, ""), ("connect", "connect", "error", Fate.RETRY)),
        (OSError(errno.EMFILE, ""), ("connect", "connect", "error", Fate.RETRY)),
        (OSError(errno.EADDRNOTAVAIL, ""), ("connect", "connect", "error", Fate.RETRY)),
        (socket.gaierror(-2, "unknown"), ("connect", "connect", "error", Fate.RETRY)),
    ],
)
def test_no_connection(error: OSError, expected: tuple[str, str, str, Fate]) -> None:
    outcome = responses.connect_failed(error, "mx.test [192.0.2.1]")
    assert words(outcome) == expected
    assert outcome.description is not None
    assert outcome.description.startswith("mx.test [192.0.2.1]: ")


def test_nothing_that_connecting_can_meet_is_final() -> None:
    for number in errno.errorcode:
        error = OSError(number, "")
        assert responses.connect_failed(error, "mx.test").fate is Fate.RETRY
        assert responses.cannot_bind(error, "192.0.2.1").fate is Fate.RETRY


def test_what_a_peer_says_outweighs_what_keeps_us_from_it() -> None:
    answer = responses.refused(Refused(Step.INTRO, Reply(554, "not you")))
    silence = responses.connect_timed_out("mx.test")
    faults = [
        responses.cannot_bind(OSError(errno.EADDRINUSE, ""), "192.0.2.1"),
        *(
            responses.connect_failed(OSError(number, ""), "mx.test")
            for number in (errno.EMFILE, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EAFNOSUPPORT)
        ),
    ]
    for fault in faults:
        assert fault.own_fault
        assert responses.outweighs(answer, fault) and not responses.outweighs(fault, answer)
        assert responses.outweighs(silence, fault) and not responses.outweighs(fault, silence)
    assert responses.outweighs(answer, silence) and not responses.outweighs(silence, answer)
    assert responses.outweighs(answer, answer)
    no = responses.connect_failed(OSError(errno.ECONNREFUSED, ""), "mx.test")
    unreachable = responses.connect_failed(OSError(errno.EHOSTUNREACH, ""), "mx.test")
    assert responses.outweighs(no, unreachable)
    assert not responses.outweighs(unreachable, no)
    assert not unreachable.own_fault


def test_no_hosts() -> None:
    assert words(responses.no_hosts("gone", None)) == ("nohosts", "dns", "error", Fate.RETRY)
    final = responses.no_hosts("", Reply(556, "5.1.10 null MX"))
    assert words(final) == ("error", "dns", "error", Fate.FAILED)
    assert (final.code, final.status) == (556, "5.1.10")


def test_descriptions_are_bounded() -> None:
    lines = "\n".join(["x" * 2000] * 100)
    outcome = responses.refused(Refused(Step.RCPTTO, Reply(550, lines)))
    assert len(outcome.description or "") == 1000


def all_outcomes() -> list[Outcome]:
    reply = Reply(450, "no")
    errors = (OSError(errno.ECONNREFUSED, ""), OSError(errno.EHOSTUNREACH, ""))
    return [
        *(each for each in vars(responses).values() if isinstance(each, Outcome)),
        responses.accepted(Accepted(reply)),
        *(responses.refused(Refused(step, reply)) for step in responses._STATES),
        *(
            responses.failed(Failed(step, problem, ""))
            for step in responses._STATES
            for problem in Problem
        ),
        *(responses.connect_failed(error, "h") for error in errors),
        responses.connect_timed_out("h"),
        responses.cannot_bind(errors[0], "192.0.2.1"),
        responses.no_fitting_address("h", "192.0.2.1"),
        responses.no_hosts("", None),
        responses.no_hosts("", reply),
        responses.unsendable("x"),
        responses.not_made("personalize", "line 1: x"),
        responses.tls_failed(TlsFailure(Reason.FAILURE, "x", requiretls=True)),
        responses.not_made("responsive", "property mime.to: x"),
        responses.rejected_by_plugin(reply),
        responses.refused_on_arrival(reply),
        responses.suppressed(Row(kind="suppression", code=550)),
        *(responses.forced(Row(kind="error", code=code)) for code in (250, 450, 550)),
    ]


def test_results_have_the_words_that_are_documented_and_no_others() -> None:
    outcomes = all_outcomes()
    assert {each.type for each in outcomes} == set(responses.TYPES)
    assert {each.state for each in outcomes} == set(responses.STATES)
    assert {each.result for each in outcomes} == set(responses.RESULTS)


def test_tls_that_fails_is_tried_again_and_requiretls_has_a_status_at_the_end() -> None:
    failure = TlsFailure(Reason.HOST_MISMATCH, "mx.test: the certificate is for another name")
    outcome = responses.tls_failed(failure)
    assert words(outcome) == ("tls", "starttls", "error", Fate.RETRY)
    assert (outcome.code, outcome.status, outcome.description) == (454, "4.7.5", failure.text)
    assert responses.at_the_end(outcome) is outcome
    promise = responses.tls_failed(TlsFailure(Reason.FAILURE, "x", requiretls=True))
    assert (promise.status, promise.fate) == ("4.7.30", Fate.RETRY)
    end = responses.at_the_end(promise)
    assert (end.code, end.status, end.description) == (550, "5.7.30", "x")
    late = responses.tls_failed(TlsFailure(Reason.FAILURE, "x", timed_out=True))
    assert late.result == "timeout"
