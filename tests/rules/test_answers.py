"""The file of patterns for replies: what a reply means, and mistakes with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.rules import responses
from mailerq.rules.answers import Answers, Rule, Trigger, stated_seconds
from mailerq.rules.reactions import CLASSES
from mailerq.rules.recovery import Recovery
from mailerq.rules.responses import Fate
from mailerq.rules.shaping import Shaping
from mailerq.wire.client import Refused, Step
from mailerq.wire.smtp import Reply
from tests.support import ROOT, least_seconds

CONTRIB = ROOT / "contrib"
PROVIDERS = {"google"}


def read(text: str) -> Answers:
    return Answers.parse(text.encode(), "answers.toml", PROVIDERS)


def mistakes(text: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert {problem.key for problem in caught.value.problems} == {"responses-file"}
    return [(problem.where, problem.text) for problem in caught.value.problems]


def kind(answers: Answers, reply: str, command: str = "rcpt", provider: str = "") -> str | None:
    verdict = answers.classify(int(reply[:3]), reply, command, provider)
    return None if verdict is None else verdict.kind


FULL = """
[[response]]
name = "full"
text = "over quota"
class = "mailbox-full"
samples = ["552 5.2.2 over quota"]
"""

FAST = """
[[response]]
name = "fast"
provider = "google"
code = "4xx"
command = "dot"
text = 'rate \\d+'
class = "speeding"
samples = "421 4.7.0 rate 5"
"""

# What a reply means.


def test_a_reply_that_no_pattern_matches_has_no_meaning() -> None:
    assert kind(read(FULL), "552 too much") is None
    assert kind(Answers([]), "552 over quota") is None


@pytest.mark.parametrize(
    ("reply", "command", "provider", "expected"),
    [
        ("421 4.7.0 Rate 17", "dot", "google", "speeding"),
        ("521 4.7.0 rate 17", "dot", "google", None),
        ("421 4.7.0 rate 17", "rcpt", "google", None),
        ("421 4.7.0 rate 17", "dot", "", None),
        ("421 4.7.0 rate", "dot", "google", None),
    ],
)
def test_provider_code_command_and_text_must_match(
    reply: str, command: str, provider: str, expected: str | None
) -> None:
    assert kind(read(FAST), reply, command, provider) == expected


def rule(name: str, text: str, priority: int = 100, *, final: bool = True, **more: object) -> str:
    lines = [f"{key.replace('_', '-')} = {value!r}" for key, value in more.items()]
    return "\n".join((
        "[[response]]", f'name = "{name}"', f'text = "{text}"', f"priority = {priority}",
        f"final = {str(final).lower()}", f'samples = ["421 {text}"]', *lines, "",
    ))  # fmt: skip


def test_the_first_pattern_by_priority_decides_and_one_that_is_not_final_adds() -> None:
    answers = read(
        rule("late", "b", 200, **{"class": "content"})
        + rule("first", "ab", **{"class": "auth"})
        + rule("adds", "x", 50, final=False, pause="1h", retry_after="2h")
    )
    assert kind(answers, "421 ab") == "auth"
    assert kind(answers, "421 b") == "content"
    verdict = answers.classify(421, "421 x ab", "dot", "")
    assert verdict is not None and verdict.kind == "auth"
    assert [each.name for each in verdict.rules] == ["adds", "first"]
    assert (verdict.reaction.retry_after, verdict.reaction.alert) == (7200, True)
    assert kind(answers, "421 x") == ""


def test_a_pattern_says_more_than_its_class() -> None:
    answers = read(
        rule("r", "x", **{"class": "reputation-temp"}, pause="5m", trigger="3/2h", scope="site")
    )
    (found,) = answers.rules
    assert (found.reaction.pause, found.reaction.max_pause) == (300, 4 * 3600)
    assert found.trigger == Trigger(3, 7200) and not found.whole_provider
    (plain,) = read(rule("r", "x", **{"class": "greylist"})).rules
    assert plain.reaction is CLASSES["greylist"][1] and plain.trigger == Trigger(1, 0.0)
    (other,) = read(rule("r", "x", **{"class": "user-rate"}, message="fail", pause=0)).rules
    assert other.reaction.fate is Fate.FAILED and not other.reaction.moves_the_flow


@pytest.mark.parametrize("pause", ["1h", "6h"])
def test_a_longer_pause_than_the_longest_of_the_class_is_kept_to(pause: str) -> None:
    answers = read(rule("r", "x", **{"class": "reputation-temp"}, pause=pause))
    (found,) = answers.rules
    recovery = Recovery()
    assert recovery.refuse(found.reaction, 0.0, connections=1, most=0)
    assert recovery.until == int(pause[0]) * 3600


def test_less_mail_goes_for_half_an_hour_unless_something_else_is_said() -> None:
    for kind, more, lasts in (
        ("content", {}, 1800),
        ("content", {"for": "1h"}, 3600),
        ("speeding", {}, 1800),
        ("toomanyconn", {}, 3600),
    ):
        text = rule("r", "x", **{"class": kind}, max_connections=1, **more)
        assert read(text).rules[0].reaction.lasts == lasts
    assert read(rule("r", "x", **{"class": "content"})).rules[0].reaction.lasts is None


def test_only_replies_of_a_peer_have_a_meaning() -> None:
    answers = read(FULL)
    heard = responses.refused(Refused(Step.RCPTTO, Reply(552, "5.2.2 Over\nquota")))
    verdict = answers.judge(heard, "")
    assert verdict is not None and verdict.kind == "mailbox-full"
    ours = responses.rejected_by_plugin(Reply(552, "5.2.2 over quota"))
    assert answers.judge(ours, "") is None
    assert answers.judge(responses.NO_DATA, "") is None


def test_a_greylisting_reply_says_when_to_come_again() -> None:
    answers = read(rule("grey", "grey", **{"class": "greylist"}))
    for text, seconds in (
        ("grey, wait 90 seconds", 90),
        ("grey, wait 1 second", 60),
        ("grey", 300),
        ("grey in 99 hours", 300),
    ):
        verdict = answers.judge(responses.refused(Refused(Step.RCPTTO, Reply(450, text))), "")
        assert verdict is not None and verdict.reaction.retry_after == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("try again in 5 minutes", 300),
        ("Try again after 30 secs.", 30),
        ("wait 1h", 3600),
        ("for 00:05:00", 300),
        ("in 0 seconds", 1),
        ("in 5 mailboxes", None),
        ("in 5", None),
        ("within 25 hours", None),
        ("", None),
    ],
)
def test_stated_times(text: str, seconds: float | None) -> None:
    assert stated_seconds(text) == seconds


letters = st.text("ab1", min_size=1, max_size=3)
rules = st.builds(
    Rule,
    name=st.just("r"),
    where=st.just("f:1"),
    kind=st.sampled_from(sorted(CLASSES)),
    provider=st.sampled_from(["", "google"]),
    codes=st.sets(st.sampled_from(["4", "5", "421"]), max_size=2).map(frozenset),
    commands=st.sets(st.sampled_from(["rcpt", "dot"]), max_size=1).map(frozenset),
    texts=st.lists(letters, max_size=2).map(tuple),
    priority=st.integers(0, 2),
    final=st.booleans(),
)


@given(
    st.lists(rules, max_size=6),
    st.sampled_from([421, 450, 550]),
    st.text("abAB1 ", max_size=8),
    st.sampled_from(["rcpt", "dot", ""]),
    st.sampled_from(["", "google", "other"]),
)
def test_rules_are_asked_one_after_the_other(
    given_rules: list[Rule], code: int, text: str, command: str, provider: str
) -> None:
    expected = []
    for each in sorted(given_rules, key=lambda one: one.priority):
        digits = str(code)
        if (
            (not each.texts or any(part in text.lower() for part in each.texts))
            and (not each.codes or digits in each.codes or digits[0] in each.codes)
            and (not each.commands or command in each.commands)
            and each.provider in ("", provider)
        ):
            expected.append(each)
            if each.final:
                break
    verdict = Answers(given_rules).classify(code, text, command, provider)
    assert (verdict.rules if verdict else ()) == tuple(expected)


# Mistakes.


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('clas = "auth"', "unknown key 'clas' in [[response]]; did you mean class?"),
        ('class = "fast"', "class: 'fast' is not one of speeding, toomanyconn"),
        ('provider = "gogle"', "no [[provider]] in limits-file is named 'gogle', so this never"),
        ("code = 250", "code: 250 is not a code such as 421, or 4xx or 5xx"),
        ('code = ["4xx", "6"]', "code: '6' is not a code"),
        ('command = "quit"', "command: 'quit' is not one of banner, ehlo"),
        ("text = '('", "text: not a regular expression of RE2: missing )"),
        ("text = '(?=a)'", "text: not a regular expression of RE2: invalid perl operator"),
        ("text = 'a*'", "text: 'a*' matches every reply"),
        ("priority = -1", "priority: -1 is not a whole number from 0"),
        ('trigger = "often"', "trigger: 'often' is not a number in a time such as 3/h"),
        ('trigger = "2000/h"', "from 1 to 100 replies"),
        ('pause = "2 weeks"', "pause: '2 weeks' is not a time such as 90s, 10m, 4h or 1d"),
        ("pause = -5", "pause: -5 is not between 0 and 30d"),
        ("slow = 2", "slow: 2 is not a share of the rate such as 0.5"),
        ('message = "drop"', "message: 'drop' is not one of retry, fail"),
        ('final = "no"', "final: 'no' is not true or false"),
        ('max-pause = "1h"', "max-pause: has no effect without pause"),
        ('for = "1h"', "for: has no effect without slow"),
        ('leave-host = "a while"', "leave-host: 'a while' is not a time such as 90s"),
        ('scope = "world"', "scope: 'world' is not one of provider, site"),
        ('scope = "site"', "scope: has no effect: nothing is done but to the message"),
        ('samples = ["over quota"]', "samples: 'over quota' is not a reply such as"),
        ('samples = ["552 full"]', "samples: 'full' does not match '552 full'"),
        ("samples = 5", "samples: 5 is not a text or a list of texts"),
    ],
)
def test_a_mistake_is_named_with_its_line(line: str, text: str) -> None:
    key = line.partition(" ")[0]
    kept = [each for each in FULL.splitlines() if not each.startswith(f"{key} ")]
    found = mistakes("\n".join([*kept, line]))
    assert [each for each in found if text in each[1]], found
    places = {f"answers.toml:{len(kept) + 1}", "answers.toml:2"}
    assert {where for where, _ in found} <= places


def test_what_is_missing_is_named() -> None:
    (found,) = mistakes("[[response]]\nname = 'x'\nclass = 'auth'\n")
    assert "matches every reply" in found[1]
    found = mistakes("[[response]]\ntext = 'x'\n")[0]
    assert found == ("answers.toml:1", "a [[response]] needs a name")
    texts = [text for _, text in mistakes("[[response]]\ntext = 'x'\nname = 'y'\n")]
    assert any("needs a class" in text for text in texts)
    assert any("needs samples" in text for text in texts)


def test_fate_and_retry_contradict_each_other() -> None:
    (found,) = mistakes(FULL + "message = 'fail'\nretry-after = '1h'\n")
    assert found == ("answers.toml:8", "retry-after: has no effect: the message fails")


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            "command = 'banner'\nleave-host = '1m'",
            "leave-host: has no effect: a host that does not let us in is tried last anyway",
        ),
        (
            "code = '5xx'\nretry-after = '1h'",
            'retry-after: has no effect without message = "retry": 5xx fails',
        ),
        (
            "code = [550, '5xx']\ncount-attempt = false",
            'count-attempt: has no effect without message = "retry"',
        ),
        ("code = '4xx'\nsuppress = true", "suppress: has no effect: the message does not fail"),
    ],
)
def test_keys_that_can_do_nothing_for_the_replies_of_a_pattern(lines: str, text: str) -> None:
    reply = "452 over quota" if "4xx" in lines else "552 over quota"
    given = FULL.replace("552 5.2.2 over quota", reply)
    (found,) = mistakes(f"{given}{lines}\n")
    assert found[1].startswith(text)
    assert read(f"{given}{lines.partition(chr(10))[0]}\n"), "the other line is none"


def test_the_same_pattern_twice_is_a_mistake() -> None:
    found = mistakes(FULL + FULL.replace('"full"', '"again"').replace("mailbox-full", "auth"))
    assert found == [("answers.toml:8", "'again' matches the same replies as 'full'")]
    texts = [text for _, text in mistakes(FULL + FULL)]
    assert "name: 'full' is there twice, first at answers.toml:2" in texts


def test_a_pattern_behind_one_that_takes_its_samples_is_a_mistake() -> None:
    wide = rule("wide", "quota", 50, **{"class": "content"})
    (found,) = mistakes(FULL + wide)
    text = "samples: 'wide' (answers.toml:7) takes '552 5.2.2 over quota' before 'full'"
    assert found == ("answers.toml:2", text)
    assert read(FULL + wide.replace("final = true", "final = false"))


def test_samples_may_have_lines() -> None:
    assert read(FULL.replace('"552 5.2.2 over quota"', '"552-5.2.2 over\\n552 5.2.2 quota"'))
    assert mistakes(FULL.replace('"552 5.2.2 over quota"', '"552-over\\n421 quota"'))


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: f"{FULL}{text}".encode()))
def test_no_file_breaks_the_reader(data: bytes) -> None:
    places = set()
    try:
        Answers.parse(data, "answers.toml", ())
    except ConfigError as error:
        places = {problem.where for problem in error.problems}
    assert all(place.startswith("answers.toml:") for place in places)


# The files that we ship.


@pytest.fixture(scope="module")
def shipped() -> Answers:
    config = Config(
        limits_file=str(CONTRIB / "providers.toml"), responses_file=str(CONTRIB / "responses.toml")
    )
    answers = Answers.of(config, Shaping.of(config).providers)
    assert answers is not None
    return answers


def test_the_shipped_files_have_no_mistakes(shipped: Answers) -> None:
    assert len(shipped.rules) > 70
    assert all(len(each.samples) >= 2 for each in shipped.rules)


def test_each_shipped_pattern_is_dated() -> None:
    for name in ("providers.toml", "responses.toml"):
        text = (CONTRIB / name).read_text()
        for table in text.split("[[")[1:]:
            assert table.startswith("provider]]") or " 2026-" in table, table


def test_shipped_samples_mean_what_they_say(shipped: Answers) -> None:
    for reply, provider, expected in (
        ("421 4.7.28 unusual rate of mail", "google", "reputation-temp"),
        ("550 5.2.1 is receiving mail too quickly", "google", "user-rate"),
        ("554 5.4.6 too many hops", "google", "loop"),
        ("550 5.1.1 unknown user", "apple", "user-unknown"),
        ("550 Ip frequency limited", "qq", "speeding"),
        ("421 Max message per connection reached", "yahoo", "session-limit"),
        ("450 4.2.0 Greylisted", "", "greylist"),
        ("451 4.3.2 not now", "", "system"),
        ("421 4.7.0 Try again later, closing connection.", "google", "system"),
        ("250 2.0.0 ok", "google", None),
    ):
        assert kind(shipped, reply, "dot", provider) == expected, reply


def test_the_example_of_the_page_has_no_mistakes() -> None:
    page = (ROOT / "docs" / "answers.md").read_text()
    text = page.partition("```toml\n")[2].partition("```")[0]
    assert Answers.parse(text.encode(), "answers.md", ["example"]).rules


def test_settings_without_a_file_have_no_patterns() -> None:
    assert Answers.of(Config(), ()) is None


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="responses-file: cannot read"):
        Answers.of(Config(responses_file=str(tmp_path / "none")), ())


@pytest.mark.parametrize(
    "unit", ["a", "4.7.5", "try again in 5 ", "unusual rate 4.7.28 ", "é", "1:"]
)
def test_a_hostile_reply_costs_no_more_than_a_common_one(shipped: Answers, unit: str) -> None:
    text = "421 " + unit * (65536 // len(unit))

    def read_all() -> None:
        for _ in range(20):
            shipped.classify(421, text, "dot", "google")
            stated_seconds(text)

    assert least_seconds(read_all) < 0.2


def test_texts_that_stall_other_engines_are_harmless() -> None:
    answers = read(
        "[[response]]\nname = 'x'\nclass = 'auth'\ntext = '(a*)*(a|aa)+b$'\nsamples = '421 aab'\n"
    )
    text = "421 " + "a" * 65536
    assert kind(answers, text) is None
    assert least_seconds(lambda: kind(answers, text)) < 0.1
