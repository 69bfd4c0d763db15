"""What reports to senders need beside the settings: their texts, and the keys of return addresses.

`Reports` reads the files of `dsn-texts-file` and `verp-key-file`. A texts file is TOML with a
``[[text]]`` for each language and event; docs/bounces.md explains it to operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Self

from mailerq.errors import ConfigError, Problem
from mailerq.mail import dsn_texts, verp
from mailerq.mail.dsn_texts import EVENTS, MAX_TEXT, Text, Texts, languages_in, unknown_variables
from mailerq.rules.bounces import why_not
from mailerq.rules.tables import TableReader, file_bytes
from mailerq.spelling import Spelling

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["NO_REPORTS", "Reports", "parse_texts", "read_keys", "read_texts"]

TEXTS_KEY: Final = "dsn-texts-file"
KEYS_KEY: Final = "verp-key-file"

KEYS: Final = ("language", "event", "subject", "text", "name")


class Reports:
    """The texts and keys in force. Immutable; any thread may use it."""

    def __init__(
        self, texts: Texts = dsn_texts.DEFAULT, verp_keys: tuple[verp.Key, ...] = ()
    ) -> None:
        self.texts = texts
        self.verp_keys = verp_keys

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read what the settings name. Raises `ConfigError` with all mistakes."""
        problems: list[Problem] = []
        texts, keys = dsn_texts.DEFAULT, tuple[verp.Key, ...]()
        try:
            texts = read_texts(config)
        except ConfigError as error:
            problems += error.problems
        try:
            keys = read_keys(config)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError.of(problems)
        return cls(texts, keys)

    def return_path(
        self, properties: Mapping[str, Any], envelope: str, config: Config, *, now: float
    ) -> str:
        """The address for MAIL FROM, of a message whose `envelope` is in wire form."""
        if not self.verp_keys or not envelope:
            return envelope
        wish = properties.get("verp")
        base = envelope
        if isinstance(wish, str):
            if wish and why_not(wish) is None:
                base = wish
        elif wish is None:
            if envelope.rpartition("@")[2].lower() not in config.verp_domains:
                return envelope
        elif not wish:
            return envelope
        identifier = properties.get("message-id")
        address = verp.encode(
            base,
            properties.get("recipient") or "",
            self.verp_keys,
            now=now,
            message_id=identifier if isinstance(identifier, str) else "",
        )
        return envelope if address is None else address


NO_REPORTS: Final = Reports()


def read_keys(config: Config) -> tuple[verp.Key, ...]:
    """The keys of `verp-key-file`, the signing one first. Raises `ConfigError`."""
    path = config.verp_key_file
    if not path:
        return ()
    data = file_bytes(path, KEYS_KEY, config.origin(KEYS_KEY))
    try:
        return verp.parse_keys(data.decode())
    except UnicodeDecodeError:
        text = "is not UTF-8"
    except ValueError as error:
        text = str(error)
    problem = Problem(config.origin(KEYS_KEY), f"{KEYS_KEY}: {path}: {text}", KEYS_KEY)
    raise ConfigError.of([problem])


def read_texts(config: Config) -> Texts:
    """The texts of `dsn-texts-file`, with English ones where it has none. Raises `ConfigError`."""
    path = config.dsn_texts_file
    if not path:
        return dsn_texts.DEFAULT
    return parse_texts(file_bytes(path, TEXTS_KEY, config.origin(TEXTS_KEY)), path)


def parse_texts(data: bytes, path: str) -> Texts:
    """Read the content of a texts file. Raises `ConfigError` with all mistakes.

    The language of the first text is for senders whose languages the file does not have.
    """
    reader = TableReader(data, path, key=TEXTS_KEY, spellings={"text": Spelling(KEYS)})
    texts: dict[tuple[str, str], Text] = {}
    default = ""
    for index, table in reader.tables(reader.tree(), "text"):
        values = {key: reader.text("text", index, table, key) for key in KEYS}
        for key in KEYS:
            if key not in table:
                reader.wrong(reader.at("text", index), f"a [[text]] needs a {key}")
        language, event = values["language"].lower(), values["event"]
        if language and languages_in(language) != (language,):
            reader.wrong(
                reader.at("text", index, "language"),
                f"language: {values['language']!r} is not a language such as en or pt-BR",
            )
        if event and event not in EVENTS:
            reader.wrong(
                reader.at("text", index, "event"),
                f"event: {event!r} is none of {', '.join(EVENTS)}",
            )
        for key in ("subject", "text"):
            line = reader.at("text", index, key)
            if len(values[key]) > MAX_TEXT:
                reader.wrong(line, f"{key}: has more than {MAX_TEXT} characters")
            for name in unknown_variables(values[key]):
                reader.wrong(line, f"{key}: ${{{name}}} is not known")
        if "\n" in values["subject"]:
            reader.wrong(reader.at("text", index, "subject"), "subject: is more than one line")
        if (language, event) in texts:
            reader.wrong(reader.at("text", index), f"there is another text {event} in {language}")
        default = default or language
        texts[language, event] = Text(values["subject"], values["text"] + "\n", values["name"])
    if reader.problems:
        raise ConfigError.of(reader.problems)
    return Texts(texts, default or "en")
