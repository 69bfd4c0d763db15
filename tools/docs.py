"""Generate the tables in the pages of docs/ from the tables of the program.

``python tools/docs.py`` (or ``make docs``) rewrites the text between ``<!-- made: NAME -->`` and
``<!-- /made -->``; all other text is written by hand. A test fails if a page is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tables of this tree, whatever is installed

from mailerq.address import (  # noqa: E402
    DOMAIN_LIMIT,
    LOCAL_LIMIT,
    MAILBOX_LIMIT,
    QUEUE_LIMIT,
)
from mailerq.config import SETTINGS  # noqa: E402
from mailerq.mail.edits import EDITS_LIMIT  # noqa: E402
from mailerq.mail.extract import FIELDS, FIELDS_LIMIT  # noqa: E402
from mailerq.mail.headers import HEADER_LIMIT, HOP_LIMIT  # noqa: E402
from mailerq.mail.modifiers import ALIASES, MODIFIERS  # noqa: E402
from mailerq.mail.parts import PART_LIMIT  # noqa: E402
from mailerq.mail.reports import TYPES as REPORTS  # noqa: E402
from mailerq.mail.template import NESTING_LIMIT as BLOCKS_LIMIT  # noqa: E402
from mailerq.mail.values import OUTPUT_LIMIT, STEPS_LIMIT, TEXT_LIMIT  # noqa: E402
from mailerq.message import NESTING_LIMIT, PROPERTIES_LIMIT  # noqa: E402
from mailerq.properties import KNOWN, PROPERTIES, SECONDS_LIMIT  # noqa: E402
from mailerq.queues import DAMAGED_QUEUE  # noqa: E402
from mailerq.rules.reactions import CLASSES, Reaction  # noqa: E402
from mailerq.rules.reports import HARD_STATUSES  # noqa: E402
from mailerq.rules.responses import RESULTS, STATES, TYPES, Fate  # noqa: E402
from mailerq.settings import Setting  # noqa: E402
from mailerq.wire.parameters import ENVID_LIMIT, ORCPT_LIMIT  # noqa: E402

MADE: Final = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- /made -->)", re.DOTALL)

Row = Sequence[object]


def table(headings: Sequence[str], rows: Iterable[Row]) -> str:
    """Format a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def properties() -> str:
    """The properties, by group, with the keys of objects."""
    parts = []
    for group, known in groupby(PROPERTIES, key=lambda each: each.group):
        rows: list[Row] = []
        for each in known:
            rows.append((f"`{each.name}`", each.expected, each.meaning))
            for key in each.keys:
                meaning = key.meaning if key.used else f"{key.meaning} Has no effect yet."
                rows.append((f"`{each.name}.{key.name}`", "", meaning))
        parts.append(f"### {group}\n\n{table(('property', 'type', 'meaning'), rows)}")
    return "\n".join(parts)


def fields() -> str:
    """The x-mq-* fields, and their properties."""
    rows: list[Row] = []
    for name, known in FIELDS.items():
        field = name if name.startswith("x-") else f"x-mq-{name}"
        outer = KNOWN[known.path[0]]
        keys = {key.name: key.used for key in outer.keys}
        used = outer.used and (len(known.path) == 1 or keys[known.path[1]])
        meaning = known.meaning if used else f"{known.meaning} Has no effect yet."
        rows.append(
            (f"`{field}`", f"`{'.'.join(known.path)}`", "yes" if known.safe else "", meaning)
        )
    own = "Your own property, a string. Names of known properties are not allowed."
    rows.append(("`x-mq-anything`", "`anything`", "yes", own))
    return table(("field", "property", "harmless", "meaning"), rows)


def modifiers() -> str:
    """The modifiers of templates."""
    rows = (
        (f"`{known.example}`", known.meaning)
        for name, known in MODIFIERS.items()
        if name not in ALIASES
    )
    return table(("example", "result"), rows)


def queues() -> str:
    """The queues, by their settings."""
    keys = "outbox inbox local reports results success failure retry".split()
    known = {setting.key: setting for setting in SETTINGS}
    rows = [
        (f"`{setting.key}`", setting.default_text, setting.text)
        for setting in (known[f"rabbitmq-{key}"] for key in keys)
    ]
    aside = "Messages that cannot be read or stored, set aside with the reason in `damaged`."
    return table(("setting", "default", "documents"), [*rows, ("", DAMAGED_QUEUE, aside)])


def results() -> str:
    """The words of results."""
    vocabularies = (("type", TYPES), ("state", STATES), ("result", RESULTS))
    return "\n".join(
        table((f"`{name}`", "meaning"), ((f"`{word}`", text) for word, text in words.items()))
        for name, words in vocabularies
    )


def classes() -> str:
    """The classes of replies, with their reactions."""
    rows: list[Row] = []
    for name, (meaning, reaction) in CLASSES.items():
        said = ", ".join(_said(reaction)) or "as the code says"
        rows.append((f"`{name}`", meaning, said))
    return table(("class", "meaning", "reaction"), rows)


def _said(reaction: Reaction) -> Iterator[str]:
    """The keys of a file that would say a reaction."""
    names = {"fate": "message", "counted": "count-attempt", "lasts": "for"}
    for attribute in reaction.__struct_fields__:
        value = getattr(reaction, attribute)
        if value is None:
            continue
        if isinstance(value, Fate):
            value = "retry" if value is Fate.RETRY else "fail"
        elif isinstance(value, float) and value >= 1:
            value = _duration(int(value))
        word = f'"{value}"' if isinstance(value, str) else str(value).lower()
        yield f"`{names.get(attribute, attribute.replace('_', '-'))} = {word}`"


def _duration(seconds: int) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def reports() -> str:
    """The types of reports that come in."""
    return table(("`type`", "meaning"), ((f"`{name}`", text) for name, text in REPORTS.items()))


def hard() -> str:
    """The status codes of hard bounces."""
    rows = ((f"`{code}`", text) for code, text in HARD_STATUSES.items())
    return table(("status", "meaning"), rows)


def limits() -> str:
    """The limits of documents and mails."""
    rows: list[Row] = [
        ("properties of a document beside its body", f"{PROPERTIES_LIMIT} bytes", "refused"),
        ("nested objects and arrays", NESTING_LIMIT, "refused"),
        ("a delay in `retries`", f"{SECONDS_LIMIT} s", "unsendable"),
        ("the name of a queue", f"{QUEUE_LIMIT} bytes, printable", "refused"),
        ("an address", f"{MAILBOX_LIMIT} bytes", "unsendable"),
        ("its local part", f"{LOCAL_LIMIT} bytes", "unsendable"),
        ("its domain", f"{DOMAIN_LIMIT} bytes", "unsendable"),
        ("`dsn.envid`", f"{ENVID_LIMIT} characters", "left out"),
        ("`dsn.orcpt`", f"{ORCPT_LIMIT} characters", "left out"),
        ("Received fields of a mail, with ours", HOP_LIMIT, "looping: refused (554), or fails"),
        ("steps of the templates of a mail", STEPS_LIMIT, "fails"),
        ("output of the templates of a mail", f"{OUTPUT_LIMIT} characters", "fails"),
        ("a text that a modifier makes", f"{TEXT_LIMIT} characters", "fails"),
        ("nested blocks or brackets of a template", BLOCKS_LIMIT, "fails"),
        ("a text part that is a template", f"{PART_LIMIT} bytes", "fails"),
        ("fields that `headers` names", EDITS_LIMIT, "fails"),
        ("header of a received mail", f"{HEADER_LIMIT} bytes", "refused (552)"),
        ("all x-mq-* fields of a mail", f"{FIELDS_LIMIT} bytes", "refused (552)"),
        ("a received mail", f"`smtp-maxsize` ({_default('smtp-maxsize')})", "refused (552)"),
        ("recipients of a mail", f"`smtp-maxrecipients` ({_default('smtp-maxrecipients')})",
         "refused (452)"),
    ]  # fmt: skip
    return table(("what", "at most", "beyond"), rows)


def _default(key: str) -> str:
    (setting,) = (setting for setting in SETTINGS if setting.key == key)
    return setting.default_text


def settings() -> str:
    """All settings, by group."""
    parts = []
    for group in dict.fromkeys(setting.group for setting in SETTINGS):
        rows = [
            (
                f"`{each.key}`",
                _value(each),
                _default_of(each),
                "restart" if each.fixed else "",
                each.text + "".join(_more(each)),
            )
            for each in SETTINGS
            if each.group == group
        ]
        parts.append(
            f"## {group}\n\n{table(('setting', 'value', 'default', 'change', 'meaning'), rows)}"
        )
    return "\n".join(parts)


def _value(setting: Setting) -> str:
    return f"{setting.kind.name}, {setting.unit}" if setting.unit else setting.kind.name


def _default_of(setting: Setting) -> str:
    value = setting.write(setting.default)
    return f"`{value}`" if value else setting.unset


def _more(setting: Setting) -> Iterator[str]:
    """Add the limits and the other names of a setting."""
    least, most = setting.minimum, setting.maximum
    if least is not None and most is not None:
        yield f" From {least:g} to {most:g}."
    elif least is not None and least >= 1:
        yield f" At least {least:g}."
    if setting.aliases:
        yield f" Also called {', '.join(f'`{name}`' for name in setting.aliases)}."


TABLES: Final[dict[str, Callable[[], str]]] = {
    made.__name__: made
    for made in (
        properties,
        fields,
        modifiers,
        queues,
        results,
        classes,
        reports,
        hard,
        limits,
        settings,
    )
}


def filled(page: str) -> str:
    """Return the page with its tables. Raises KeyError for an unknown table."""
    return MADE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", page)


def main() -> None:
    """Update all pages."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text()
        if (made := filled(text)) != text:
            path.write_text(made)
            print(f"{path.relative_to(ROOT)} is new")


if __name__ == "__main__":
    main()
