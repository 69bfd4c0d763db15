"""The files for reports: texts and keys, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.mail import verp
from mailerq.mail.dsn_texts import EVENTS, VARIABLES, unknown_variables
from mailerq.rules.reporting import NO_REPORTS, Reports, parse_texts
from tests.support import ROOT

GOOD = """
[[text]]
language = "de"
event = "failed"
subject = "Unzustellbar: ${subject}"
text = "Nicht an ${recipients}"
name = "Postdienst"
"""
KEYS = verp.parse_keys("a AeJ2xBrJJPd1vlTV7pVf3OlB")


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_texts(text.encode(), "t")
    return [f"{problem.where}: {problem.text}" for problem in raised.value.problems]


def test_the_first_language_is_for_everybody_else() -> None:
    texts = parse_texts(GOOD.encode(), "t")
    assert texts.find("failed", ("fr",)).name == "Postdienst"
    assert texts.find("failed", ("en",)).subject == "Undelivered mail: ${subject}"
    assert texts.find("delayed", ("fr",)).subject == "Delayed mail: ${subject}"


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("[[text]]", "[text]", "t:2: 'text' must be written [[text]]"),
        ("[[text]]", "[[texts]]", "t:2: unknown table or key 'texts'; the file has [[text]]"),
        ('name = "Postdienst"', "", "t:2: a [[text]] needs a name"),
        ('name = "Postdienst"', "nmae = 1\nname = 'x'", "t:7: unknown key 'nmae' in [[text]]"),
        ("failed", "fialed", "t:4: event: 'fialed' is none of failed, delayed"),
        ('"de"', '"d e"', "t:3: language: 'd e' is not a language such as en or pt-BR"),
        ("${subject}", "${subjekt}", "t:5: subject: ${subjekt} is not known"),
        ("Nicht", "${a} ${b}", "t:6: text: ${a} is not known"),
        ('"Unzustellbar: ${subject}"', '"a\\nb"', "t:5: subject: is more than one line"),
        ('"Postdienst"', "7", "t:7: name: 7 is not a text"),
        ("Nicht", "x" * 20_001, "t:6: text: has more than 20000 characters"),
        ("language", "language = ", "t:3: "),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, mistake: str) -> None:
    assert mistakes(GOOD.replace(old, new))[0].startswith(mistake)


def test_a_second_text_for_the_same_is_a_mistake() -> None:
    assert mistakes(GOOD + GOOD) == ["t:9: there is another text failed in de"]


def test_the_example_file_is_good_and_complete() -> None:
    path = ROOT / "contrib" / "bounces.toml"
    texts = parse_texts(path.read_bytes(), str(path))
    for language in ("en", "de", "fr", "es", "nl"):
        for event in EVENTS:
            found = texts.find(event, (language,))
            assert "${recipients}" in found.text
            assert "${hostname}" in found.text
            assert unknown_variables(found.text) == []
    assert set(VARIABLES) >= {"recipients", "hostname"}


def test_all_files_are_read_before_a_mistake_is_raised(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("[[text]]\n")
    (tmp_path / "keys").write_bytes(b"\xff")
    config = Config(dsn_texts_file=str(tmp_path / "texts"), verp_key_file=str(tmp_path / "keys"))
    with pytest.raises(ConfigError) as raised:
        Reports.of(config)
    assert {problem.key for problem in raised.value.problems} == {"dsn-texts-file", "verp-key-file"}
    with pytest.raises(ConfigError, match="cannot read"):
        Reports.of(Config(dsn_texts_file=str(tmp_path / "nothing")))


def test_domains_without_keys_are_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="verp-domains needs verp-key-file"):
        Config(verp_domains=("a.test",))


def test_a_sender_without_room_keeps_its_address() -> None:
    config = Config(verp_domains=("b.test",), verp_key_file="x")
    reports = Reports(verp_keys=KEYS)
    long = "a" * 60 + "@b.test"
    assert reports.return_path({"recipient": "c@d.test"}, long, config, now=0) == long
    assert NO_REPORTS.return_path({"verp": True}, "a@b.test", config, now=0) == "a@b.test"
