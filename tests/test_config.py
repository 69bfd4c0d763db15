"""The table of settings, the layers that fill it, and every way to get one wrong."""

import dataclasses
import ipaddress
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import NOT_YET, SETTINGS, Config, DnsServer, Setting, split_arguments
from mailerq.errors import ConfigError, Problem
from mailerq.settings import SECONDS, SIZE

ROWS = pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.key)


def load(*arguments: str, environ: dict[str, str] | None = None, **files: Any) -> Config:
    return Config.load(arguments, environ or {}, files.get("files", ()))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "config.txt") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# -- the table ----------------------------------------------------------------------------


@ROWS
def test_a_row_says_all_that_a_reader_needs(row: Setting) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+[46]?)*", row.key)
    assert row.text.endswith((".", "?")), "the text is a sentence"
    assert row.default_text, "an empty default says what it stands for"
    assert row.kind.name
    assert row.variable == "MAILERQ_" + row.key.upper().replace("-", "_")


@ROWS
def test_a_default_passes_the_check_of_its_own_row(row: Setting) -> None:
    if row.default not in (None, ""):
        assert row.check(row.default) == row.default
        assert type(row.check(row.default)) is type(row.default)


@ROWS
def test_a_default_survives_being_written_and_read(row: Setting) -> None:
    text = row.write(row.default)
    if text or row.default == () or row.default == "":
        assert row.read(text) == row.default


def test_names_are_used_once() -> None:
    names = [name for row in SETTINGS for name in (row.key, *row.aliases)] + [*NOT_YET]
    assert len(names) == len(set(names))


def test_settings_of_a_group_stand_together() -> None:
    groups = [row.group for row in SETTINGS]
    changes = [now for before, now in zip(["", *groups], groups, strict=False) if before != now]
    assert len(changes) == len(set(changes))


def test_every_field_but_the_origins_is_a_setting() -> None:
    names = {declared.name for declared in dataclasses.fields(Config) if declared.init}
    assert names - {row.attribute for row in SETTINGS} == {"origins"}


@ROWS
def test_the_annotation_of_a_field_fits_its_default(row: Setting) -> None:
    hint = get_type_hints(Config)[row.attribute]
    kinds = getattr(hint, "__args__", ()) if type(row.default) is not tuple else ()
    assert type(row.default) in (hint, getattr(hint, "__origin__", None), *kinds)


# -- the object ---------------------------------------------------------------------------


def test_without_anything_every_value_is_the_default() -> None:
    config = Config()
    assert load() == config
    assert config.smtp_port == (25,)
    assert config.smtp_maxsize == 100 * 1024 * 1024
    assert {config.origin(row.key) for row in SETTINGS} == {"default"}


def test_the_hostname_is_that_of_this_host() -> None:
    assert Config().hostname
    assert load("--hostname=mx.example.test").hostname == "mx.example.test"


def test_a_config_can_be_hashed_compared_and_not_changed() -> None:
    config = Config(smtp_port=(0,))
    assert {config, Config(smtp_port=(0,)), Config()} == {config, Config()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.smtp_port = (1,)  # type: ignore[misc]


def test_values_of_a_program_come_in_their_exact_type() -> None:
    config = Config(
        smtp_port=[0, 0],  # type: ignore[arg-type]
        smtp_timeout=5,
        smtp_range=["192.0.2.0/24"],  # type: ignore[arg-type]
        smtp_relay_domains=["Bücher.Example"],  # type: ignore[arg-type]
    )
    assert config.smtp_port == (0, 0)
    assert type(config.smtp_timeout) is float
    assert config.smtp_range == (ipaddress.ip_network("192.0.2.0/24"),)
    assert config.smtp_relay_domains == ("xn--bcher-kva.example",)
    assert hash(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smtp_port", 25),
        ("smtp_port", "25"),
        ("smtp_port", (True,)),
        ("smtp_port", (65536,)),
        ("smtp_threads", 0),
        ("smtp_threads", 1.0),
        ("smtp_threads", True),
        ("smtp_threads", None),
        ("smtp_extract", 1),
        ("smtp_timeout", "5"),
        ("smtp_timeout", float("nan")),
        ("smtp_timeout", float("inf")),
        ("smtp_maxsize", "1MB"),
        ("hostname", "mx example"),
        ("hostname", None),
        ("queue_directory", ""),
        ("queue_directory", Path("/")),
        ("application_log", "a\nb"),
        ("application_log", "\udc80"),
    ],
)
def test_a_wrong_value_of_a_program_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{name: value})
    assert caught.value.where == name.replace("_", "-")


def test_replace_changes_some_values_and_checks_them() -> None:
    config = load("--smtp-port=2525", "--smtp-threads=2")
    changed = config.replace(smtp_port=(0,))
    assert (changed.smtp_port, changed.smtp_threads) == ((0,), 2)
    assert changed.origin("smtp_port") == "program"
    assert changed.origin("smtp-threads") == "--smtp-threads"
    with pytest.raises(ConfigError):
        config.replace(smtp_threads=0)


def test_a_password_does_not_show() -> None:
    assert "hunter2" not in repr(Config(smtp_username="ann", smtp_password="hunter2"))


def test_text_is_what_a_file_would_hold() -> None:
    config = load("--smtp-port=25,1024-1026", "--smtp-maxsize=1536KB", "--dns-timeout=2.5")
    assert config.text("smtp-port") == "25,1024,1025,1026"
    assert config.text("smtp_maxsize") == "1536KB"
    assert config.text("dns-timeout") == "2.5"
    assert config.text("server-id") == ""
    assert config.text("smtp-relay-range") == "127.0.0.0/8;::1/128"
    text = "192.0.2.53, ::1, 127.0.0.1:5353, [::1]:54"
    assert load("--dns-servers", text).text("dns-servers") == text


# -- the text of values -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("smtp-port", "25", (25,)),
        ("smtp-port", "25,2525;1024-1026", (25, 2525, 1024, 1025, 1026)),
        ("smtp-port", " 25 , 26 - 27 ,", (25, 26, 27)),
        ("smtp-port", "0,0", (0, 0)),
        ("smtp-port", "", ()),
        ("smtp-maxsize", "100MB", 100 << 20),
        ("smtp-maxsize", "16GB", 16 << 30),
        ("smtp-maxsize", "512 kb", 512 << 10),
        ("smtp-maxsize", "1MiB", 1 << 20),
        ("smtp-maxsize", "12345", 12345),
        ("smtp-timeout", "2.5", 2.5),
        ("smtp-timeout", "300", 300.0),
        ("smtp-ip", "127.0.0.1;::1", ("127.0.0.1", "::1")),
        ("smtp-ip", "[::1],192.0.2.1", ("::1", "192.0.2.1")),
        ("dns-servers", "192.0.2.53; ::1", (DnsServer("192.0.2.53"), DnsServer("::1"))),
        (
            "dns-servers",
            "127.0.0.1:5353,[::1]:54",
            (DnsServer("127.0.0.1", 5353), DnsServer("::1", 54)),
        ),
        ("dns-servers", "[::1]:53", (DnsServer("::1", 53),)),
        ("dns-servers", "", ()),
        ("smtp-range", "192.0.2.0/24", (ipaddress.ip_network("192.0.2.0/24"),)),
        ("smtp-range", "192.0.2.1", (ipaddress.ip_network("192.0.2.1/32"),)),
        ("smtp-relay-range", "", ()),
        ("smtp-relay-domains", "Example.Test, b.test", ("example.test", "b.test")),
        ("retry-interval", "60,60,300", (60, 60, 300)),
        ("rabbitmq-inbox", "", ""),
        ("smtp-extract", "safe, ips", ("safe", "ips")),
        ("smtp-extract-logins", "Ann;bob@c.test", ("Ann", "bob@c.test")),
        ("smtp-extract-logins", "*", ("*",)),
        ("rabbitmq-inbox", "a b;../c", "a b;../c"),
        ("smtp-sink-address", "0.0.0.0", ""),
        ("smtp-sink-address", "localhost", "localhost"),
        ("smarthost", "[192.0.2.1]", "[192.0.2.1]"),
        ("domain-maxconnections", "-1", 0),
        ("connection-maxmessages", "0", 0),
        ("max-attempts", "+6", 6),
        ("application-log", "stderr, /var/log/a b.log", "stderr, /var/log/a b.log"),
    ],
)
def test_a_text_is_read_as_its_kind(key: str, text: str, value: Any) -> None:
    attribute = key.replace("-", "_")
    assert getattr(load(f"--{key}={text}"), attribute) == value
    assert getattr(load(environ={f"MAILERQ_{attribute.upper()}": text}), attribute) == value


@pytest.mark.parametrize(
    "way",
    [
        "--rabbitmq-local=local",
        "--rabbitmq-inbox=in",
        "--rabbitmq-inbox=",
        "--smarthost=mail.test",
        "--smtp-sink-address=127.0.0.1",
    ],
)
def test_local_domains_are_fine_where_their_mail_gets_to_somebody(way: str) -> None:
    assert load("--smtp-local-domains=a.test", way).smtp_local_domains == ("a.test",)


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "True", "YES"])
def test_extraction_that_is_on_is_safe(text: str) -> None:
    assert load("--smtp-extract", text).smtp_extract == ("safe",)
    assert Config(smtp_extract=True) == Config()  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["false", "no", "off", "0", "False", "NO", "none"])
def test_extraction_that_is_off_is_none(text: str) -> None:
    assert load("--smtp-extract", text).smtp_extract == ("none",)
    assert Config(smtp_extract=False).text("smtp-extract") == "none"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("smtp-port", "smtp", "not a whole number"),
        ("smtp-port", "65536", "not a port"),
        ("smtp-port", "-1", "not a whole number"),
        ("smtp-port", "30-25", "ends before it starts"),
        ("smtp-port", "25,24-26", "stands twice"),
        ("smtp-port", "25-", "not a whole number"),
        ("smtp-port", "²", "not a whole number"),
        ("smtp-threads", "", "needs a value"),
        ("smtp-threads", "0", "less than 1"),
        ("smtp-threads", "2.0", "not a whole number"),
        ("smtp-threads", "9" * 30, "not a whole number"),
        ("smtp-threads", "5000", "more than 1024"),
        ("max-attempts", "-2", "less than 0"),
        ("smtp-extract", "safe, safe", "stands twice"),
        ("smtp-extract", "", "needs a value"),
        ("smtp-maxsize", "100XB", "not a size"),
        ("smtp-maxsize", "-1", "not a size"),
        ("smtp-maxsize", "0", "less than 1"),
        ("smtp-timeout", "5m", "not a number"),
        ("smtp-timeout", "nan", "not a number"),
        ("smtp-timeout", "1e999", "not a number"),
        ("smtp-timeout", "0", "less than"),
        ("dns-timeout", "5000", "more than 300 s"),
        ("smtp-ip", "localhost", "not an IP address"),
        ("smtp-ip", "::1;::1", "stands twice"),
        ("dns-servers", "ns.test", "not an IP address"),
        ("dns-servers", "192.0.2.1:", "not a whole number"),
        ("dns-servers", "192.0.2.1:0", "not a port of a server"),
        ("dns-servers", "192.0.2.1:65536", "not a port"),
        ("dns-servers", "[::1", "not of the form"),
        ("dns-servers", "[::1]5353", "not of the form"),
        ("dns-servers", "fe80::1%eth0", "not an IP address"),
        ("dns-servers", "192.0.2.1, 192.0.2.1:53", "stands twice"),
        ("smtp-range", "192.0.2.1/24", "host bits set"),
        ("smtp-range", "10.0.0.0/33", "not a network"),
        ("smtp-local-domains", "a_b", "not a domain"),
        ("retry-interval", "", "needs a value"),
        ("retry-interval", ";;", "needs a value"),
        ("retry-interval", "60,-1", "less than 0"),
        ("hostname", "a b", "not a domain"),
        ("smarthost", "mail host", "not a domain"),
        ("smarthost-port", "0", "less than 1"),
        ("rabbitmq-outbox", "", "needs a value"),
        ("rabbitmq-success", "ü" * 128, "longer than 255 bytes"),
        ("queue-directory", "a\0b", "control character"),
        ("queue-directory", "a\r\nb", "control character"),
        ("queue-directory", "\udcff", "not UTF-8"),
    ],
)
def test_a_text_of_the_wrong_kind_is_refused(key: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        load(f"--{key}={text}")
    assert caught.value.where == f"--{key}"
    assert caught.value.problem.startswith(f"{key}: ")


@given(st.integers(1, 1 << 50))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert SIZE.read(SIZE.write(size)) == size


@given(st.integers(0, 10**12).map(lambda milliseconds: milliseconds / 1000))
def test_a_time_survives_being_written_and_read(seconds: float) -> None:
    assert SECONDS.read(SECONDS.write(seconds)) == seconds


@given(st.sampled_from(SETTINGS), st.text())
def test_any_text_for_any_setting_is_a_value_or_an_error(row: Setting, text: str) -> None:
    try:
        value = row.read(text)
    except ValueError:
        return
    assert row.check(value) == value


# -- files --------------------------------------------------------------------------------


def test_a_file_holds_a_setting_on_a_line(write: Any) -> None:
    path = write(
        b"\xef\xbb\xbf# a comment\r\n"
        b"\r\n"
        b"smtp-port: 2525\r\n"
        b"  smtp-threads :2   # and why\n"
        b"queue-directory:/var/a#b: c\n"
        b"rabbitmq-inbox:\n"
        b"#smtp-port: 26"
    )
    config = load(files=[path])
    assert config.smtp_port == (2525,)
    assert config.smtp_threads == 2
    assert config.queue_directory == "/var/a#b: c"
    assert config.rabbitmq_inbox == ""
    assert config.origin("smtp-port") == f"{path}:3"
    assert config.origin("smtp_threads") == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("smtp-port", "not of the form 'key: value'"),
        ("smtp-port = 25", "not of the form"),
        ("smtp-prot: 25", "unknown setting 'smtp-prot'; did you mean smtp-port?"),
        ("SMTP_PORT: 25", "did you mean smtp-port?"),
        (": 25", "unknown setting ''"),
        ("xyzzy: 25", "unknown setting 'xyzzy'"),
        ("smtp-threads: many", "smtp-threads: 'many' is not a whole number"),
        ("smtp-threads:", "smtp-threads: needs a value"),
        ("lock: /a\nlock: /b", "second value for lock; the first is at"),
        ("smtp-sink-address: a\nsmtp-sink-ip: a", "second value for smtp-sink-address"),
        ("www-port: 8485", "www-port is not supported yet"),
        ("rabbitmq-address: localhost", "a broker is amqp://user:password@host:port/vhost"),
        ("config-file: /other", "config-file cannot stand in a file"),
        ("lock: /a\x1b[2J", "control character"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(write: Any, line: str, problem: str) -> None:
    path = write(f"# first\n\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load(files=[path])
    assert problem in caught.value.problem
    assert caught.value.where == f"{path}:{3 + line.count(chr(10))}"
    assert str(caught.value).isprintable()


def test_a_line_that_is_not_utf_8_is_told(write: Any) -> None:
    path = write(b"lock: /a\nhostname: m\xfcller.test\n")
    with pytest.raises(ConfigError, match=r"config\.txt:2: is not UTF-8"):
        load(files=[path])


def test_a_file_of_another_kind_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration"):
        load(files=[write(b"#" * (2 << 20))])
    with pytest.raises(ConfigError, match="directory"):
        load(files=[str(tmp_path)])
    with pytest.raises(ConfigError, match="null"):
        load("--config-file=a\0b")


def test_a_file_that_may_not_be_read_is_an_error(write: Any) -> None:
    path = write("lock: /a")
    os.chmod(path, 0)
    root = os.geteuid() == 0
    if root:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="denied"):
            load(files=[path])
    finally:
        if root:
            os.seteuid(0)


def test_the_default_file_may_be_missing_and_a_named_one_may_not(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    assert load(files=[missing]) == Config()
    with pytest.raises(ConfigError, match="there is no such file") as caught:
        load("--config-file", missing)
    assert caught.value.where == missing


# -- layers -------------------------------------------------------------------------------


def test_a_later_layer_wins_and_the_others_stay(write: Any) -> None:
    base = write("smtp-port: 1\nsmtp-threads: 1\nrabbitmq-qos: 1\nmax-attempts: 1\n", "base.txt")
    overlay = write("smtp-port: 2\nsmtp-threads: 2\nrabbitmq-qos: 2\n", "overlay.txt")
    config = load(
        *("--config-file", overlay, "--smtp-port", "4"),
        environ={"MAILERQ_SMTP_PORT": "3", "MAILERQ_SMTP_THREADS": "3", "HOME": "/"},
        files=[base],
    )
    assert config.smtp_port == (4,)
    assert config.smtp_threads == 3
    assert config.rabbitmq_qos == 2
    assert config.max_attempts == 1
    assert [config.origin(key) for key in ("smtp-port", "smtp-threads")] == [
        "--smtp-port",
        "MAILERQ_SMTP_THREADS",
    ]
    assert config.origin("rabbitmq-qos") == f"{overlay}:3"
    assert config.origin("max-attempts") == f"{base}:4"
    assert config.origin("dns-attempts") == "default"


def test_another_spelling_in_a_later_layer_is_no_second_value(write: Any) -> None:
    config = load("--smtp-sink-ip=192.0.2.1", files=[write("smtp-sink-address: localhost")])
    assert config.smtp_sink_address == "192.0.2.1"


@pytest.mark.parametrize(
    ("alias", "text", "attribute"),
    [
        ("smtp-ranges", "192.0.2.0/24", "smtp_range"),
        ("max-deliver-time", "60", "max_delivertime"),
        ("max-connections", "60", "smtp_connections"),
        ("max-threads", "2", "smtp_threads"),
        ("max-messages", "60", "rabbitmq_qos"),
        ("error-log", "stdout", "application_log"),
    ],
)
def test_both_spellings_of_a_setting_count(alias: str, text: str, attribute: str) -> None:
    config = load(f"--{alias}={text}")
    assert config == load(f"--{attribute.replace('_', '-')}={text}")
    assert config.origin(attribute) == f"--{alias}"


def test_the_environment_may_name_the_file_and_a_switch_wins(write: Any) -> None:
    one, two = write("smtp-threads: 1", "1.txt"), write("smtp-threads: 2", "2.txt")
    environ = {"MAILERQ_CONFIG_FILE": one}
    assert load(environ=environ).origin("smtp-threads") == f"{one}:1"
    assert load(f"--config-file={two}", environ=environ).smtp_threads == 2


def test_the_real_environment_is_read_where_none_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAILERQ_SMTP_THREADS", "3")
    assert Config.load(files=()).smtp_threads == 3


def test_an_unknown_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean smtp-port") as caught:
        load(environ={"MAILERQ_SMTP_PROT": "25"})
    assert caught.value.where == "MAILERQ_SMTP_PROT"


def test_variables_that_container_platforms_set_are_left_alone() -> None:
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_SMTP", "PORT", "PORT_25_TCP_ADDR")
    assert load(environ={f"MAILERQ_{name}": "tcp://192.0.2.1:25" for name in names}) == Config()


@pytest.mark.parametrize(
    ("arguments", "where", "problem"),
    [
        (["--smtp-port"], "--smtp-port", "needs a value"),
        (["--smtp-port", "--smtp-threads=1"], "--smtp-port", "needs a value"),
        (["--smtp-prot=1"], "--smtp-prot", "did you mean smtp-port?"),
        (["--www-port=1"], "--www-port", "not supported yet"),
        (["--lock=a", "--lock", "b"], "--lock", "second value for lock"),
        (["--smtp-key=a", "--smtp-privatekey=a"], "--smtp-privatekey", "second value for smtp-key"),
        (["smtp-port=1"], "smtp-port=1", "not a setting"),
        (["--config-file=a", "--config-file=b"], "--config-file", "second value"),
    ],
)
def test_a_wrong_switch_is_told(arguments: list[str], where: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert caught.value.where == where
    assert problem in caught.value.problem


def test_a_secret_is_in_no_error(write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load("--smtp-password=hunter2\x01", files=[write("smtp-password = hunter2\n")])
    assert len(caught.value.problems) == 2
    assert "hunter2" not in str(caught.value)


def test_arguments_are_split_into_settings_and_the_rest() -> None:
    settings, rest = split_arguments(
        [
            *("queue", "--smtp-port=25", "--json", "--smtp-ranges", "a", "x@y.test"),
            *("--config-file", "f", "--www-port=1", "--", "--smtp-port=26"),
        ]
    )
    assert settings == [
        *("--smtp-port=25", "--smtp-ranges", "a", "--config-file", "f", "--www-port=1")
    ]
    assert rest == ["queue", "--json", "x@y.test", "--", "--smtp-port=26"]
    assert split_arguments(["--smtp-port"]) == (["--smtp-port"], [])


# -- contradictions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "where", "problem"),
    [
        (["--smtp-key=a.pem"], "--smtp-key", "needs smtp-certificate"),
        (["--smtp-ciphers=A:B"], "--smtp-ciphers", "needs smtp-certificate"),
        (["--smtp-secure-port=465"], "--smtp-secure-port", "needs smtp-certificate"),
        (["--smtp-username=ann"], "--smtp-username", "needs smtp-password"),
        (["--smtp-password=x"], "--smtp-password", "needs smtp-username"),
        (
            ["--smarthost=h.test", "--smarthost-username=ann"],
            "--smarthost-username",
            "needs smarthost-password",
        ),
        (
            ["--smarthost=h.test", "--smarthost-password=x"],
            "--smarthost-password",
            "needs smarthost-username",
        ),
        (
            ["--smtp-sink-username=ann", "--smtp-sink-password=x"],
            "--smtp-sink-username",
            "needs smtp-sink-address",
        ),
        (
            [
                "--smarthost=192.0.2.1",
                "--smarthost-username=ann",
                "--smarthost-password=x",
                "--connection-secure=0",
            ],
            "--smarthost-username",
            "would go to 192.0.2.1 over a connection without TLS",
        ),
        (["--connection-key=a.pem"], "--connection-key", "needs connection-certificate"),
        (
            ["--smtp-port=25,465", "--smtp-secure-port=465", "--smtp-certificate=a.pem"],
            "--smtp-secure-port",
            "port 465 is in smtp-port as well",
        ),
        (["--smtp-connections-in=1001"], "--smtp-connections-in", "more than smtp-connections"),
        (["--smtp-connections=5", "--smtp-connections-out=6"], "--smtp-connections-out", "counts"),
        (["--rabbitmq-success=outbox"], "--rabbitmq-success", "is the outbox"),
        (["--rabbitmq-inbox=outbox.wait.1"], "--rabbitmq-inbox", "is a part of the outbox"),
        (["--smtp-local-domains=a.test"], "--smtp-local-domains", "Add 'rabbitmq-local: local'"),
        (["--smtp-local-addresses=f"], "--smtp-local-addresses", "has nowhere to go"),
        (
            ["--smtp-local-addresses=f", "--local-delivery=lmtp:///run/lmtp"],
            "--smtp-local-addresses",
            "has nowhere to go",
        ),
        (
            ["--local-delivery=lmtp:///run/lmtp", "--rabbitmq-local=box"],
            "--local-delivery",
            "goes to the queue 'box'",
        ),
        (
            ["--local-delivery=lmtp:///run/lmtp", "--rabbitmq-inbox="],
            "--local-delivery",
            "is dropped",
        ),
        (
            ["--smtp-local-domains=a.test", "--rabbitmq-inbox=outbox"],
            "--smtp-local-domains",
            "has nowhere to go",
        ),
        (
            ["--smtp-local-domains=a.test", "--rabbitmq-inbox=in", "--rabbitmq-local=outbox"],
            "--smtp-local-domains",
            "has nowhere to go",
        ),
        (
            ["--smtp-local-domains=a.test", "--rabbitmq-local=l", "--smtp-relay-domains=A.test"],
            "--smtp-relay-domains",
            "a.test is in smtp-local-domains as well",
        ),
        (["--rabbitmq-outbox=a", "--rabbitmq-retry=a"], "--rabbitmq-retry", "is the outbox"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    arguments: list[str], where: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert caught.value.where == where
    assert problem in caught.value.problem


def test_port_0_may_stand_for_both_kinds_of_port() -> None:
    assert Config(smtp_port=(0,), smtp_secure_port=(0,), smtp_certificate="a.pem")


# -- all that is wrong ---------------------------------------------------------------------


def test_an_error_has_all_that_is_wrong(write: Any) -> None:
    path = write("smtp-prot: 25\nsmtp-threads: 0\nlock /a\n")
    with pytest.raises(ConfigError) as caught:
        load("--smtp-timeout=x", "--rabbitmq-results=outbox", files=[path])
    assert [tuple(problem) for problem in caught.value.problems] == [
        (f"{path}:1", "unknown setting 'smtp-prot'; did you mean smtp-port?", "smtp-port"),
        (f"{path}:3", "the line of 'lock' is not of the form 'key: value'", ""),
        (f"{path}:2", "smtp-threads: 0 is less than 1", "smtp-threads"),
        ("--smtp-timeout", "smtp-timeout: 'x' is not a number", "smtp-timeout"),
        (
            "--rabbitmq-results",
            "rabbitmq-results is the outbox: what it gets would be delivered over and over",
            "rabbitmq-results",
        ),
    ]
    assert (caught.value.where, caught.value.problem) == caught.value.problems[0][:2]
    assert str(caught.value) == "; ".join(map(str, caught.value.problems))


def test_an_object_with_several_wrong_values_names_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(smtp_threads=0, smtp_port=(70000,))
    assert [problem.where for problem in caught.value.problems] == ["smtp-port", "smtp-threads"]


def test_what_is_wrong_can_be_collected_and_has_its_default() -> None:
    problems: list[Problem] = []
    config = Config.load(
        ["--smtp-threads=0", "--smtp-key=a.pem", "--smtp-port=26"], {}, (), problems=problems
    )
    assert [problem.key for problem in problems] == ["smtp-threads", "smtp-key"]
    assert (config.smtp_threads, config.smtp_key, config.smtp_port) == (1, "", (26,))


def test_the_values_that_a_contradiction_leaves_out_may_be_all() -> None:
    problems: list[Problem] = []
    settings = ["--smtp-secure-port=465", "--rabbitmq-outbox=x", "--rabbitmq-results=x"]
    config = Config.load(settings, {}, (), problems=problems)
    assert [problem.key for problem in problems] == ["smtp-secure-port", "rabbitmq-results"]
    assert config == Config(rabbitmq_outbox="x")


@given(
    st.lists(
        st.tuples(st.sampled_from(SETTINGS), st.sampled_from(["", "0", "1", "x", "/x", "25"])),
        unique_by=lambda pair: pair[0].key,
        max_size=12,
    )
)
def test_whatever_is_set_there_is_a_configuration_and_a_list(
    given_values: list[tuple[Setting, str]],
) -> None:
    problems: list[Problem] = []
    settings = [f"--{row.key}={text}" for row, text in given_values]
    config = Config.load(settings, {}, (), problems=problems)
    if problems:
        with pytest.raises(ConfigError) as caught:
            Config.load(settings, {}, ())
        assert list(caught.value.problems) == problems
    else:
        assert Config.load(settings, {}, ()) == config


# -- cost ---------------------------------------------------------------------------------


def test_reading_the_configuration_imports_no_event_loop() -> None:
    code = (
        "import sys, mailerq; mailerq.Config.load([], {}, []);"
        "print(*{'trio', 'dns', 'apsw', 'idna', 'ssl', 'argparse', 'asyncio'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_failure_queue_is_bounded_while_nobody_has_named_it() -> None:
    assert (Config().failure_queue, Config().failure_bounds) == ("failure", (100_000, 604_800))
    assert load("--rabbitmq-failure=").failure_queue == ""
    for named in ({"rabbitmq_failure": "failure"}, {"rabbitmq_results": "failure"}):
        assert Config(**named).failure_bounds == (0, 0)
    config = Config(rabbitmq_failure="bad", failure_maxmessages=10, failure_maxage=60)
    assert config.failure_bounds == (10, 60)
    assert config.replace(smtp_processes=4).failure_bounds == (3, 60)
    assert Config(failure_maxmessages=0).failure_bounds == (0, 604_800)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rabbitmq_outbox": "failure"}, "rabbitmq-failure is the outbox"),
        ({"rabbitmq_success": "outbox"}, "rabbitmq-success is the outbox"),
        ({"rabbitmq_results": "a" * 256}, "rabbitmq-results: is longer than 255 bytes"),
        ({"rabbitmq_results": "a\u202eb"}, "holds a character that cannot be printed"),
        (
            {"rabbitmq_inbox": "x", "rabbitmq_failure": "x", "failure_maxage": 1},
            "failure-maxage would delete received mail: rabbitmq-inbox is that queue too",
        ),
        (
            {"rabbitmq_local": "failure", "failure_maxmessages": 1},
            "failure-maxmessages would delete received mail",
        ),
    ],
)
def test_queues_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("0", "none"), ("false", "none"), ("NONE", "none"), ("1", "opportunistic"),
        ("true", "opportunistic"), ("Opportunistic", "opportunistic"), ("required", "required"),
        ("verified", "verified"),
    ],
)  # fmt: skip
def test_the_tls_of_deliveries_has_words_and_the_numbers_of_older_configurations(
    text: str, level: str
) -> None:
    config = Config.load([f"--connection-secure={text}", f"--smarthost-secure={text}"], {})
    assert (config.connection_secure, config.smarthost_secure) == (level, level)
    assert Config(connection_secure=True).connection_secure == "opportunistic"  # type: ignore[arg-type]


def test_a_level_of_tls_that_is_none_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="none of none, opportunistic, required, verified"):
        Config.load(["--connection-secure=2"], {})
