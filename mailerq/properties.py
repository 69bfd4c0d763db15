"""The table of message properties.

`mailerq.message` checks documents against `PROPERTIES`, ``mailerq check`` and the log use the table
to find misspelt names, and ``docs/messages.md`` is generated from it. Other properties travel
untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from mailerq.spelling import Spelling

__all__ = ["KNOWN", "PROPERTIES", "SECONDS_LIMIT", "Key", "Property", "is_delays", "misspellings"]

SECONDS_LIMIT: Final = 10**9
"""The longest delay in ``retries``: 31 years."""

UNKNOWN_LIMIT: Final = 100
"""Unknown names to check for misspelling: a message can have 100,000."""


class Key(NamedTuple):
    """A key of a property that is an object. `used`: the key has an effect."""

    name: str
    meaning: str
    used: bool = True


class Property(NamedTuple):
    """A known property.

    `expected` is the type in words. `check` tests the type of a value; None if no code relies on
    the type. `keys` are the keys of an object, or of each object in an array. `used` is false for
    properties of MailerQ 2.1 that have no effect yet.
    """

    name: str
    group: str
    expected: str
    meaning: str
    check: Callable[[object], bool] | None = None
    keys: tuple[Key, ...] = ()
    used: bool = True


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_security(value: object) -> bool:
    return value in ("optional", "opportunistic", "required", "verified")


def _is_verp(value: object) -> bool:
    return isinstance(value, bool | str)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or value in (0, 1)


def _kinds(values: Iterable[object]) -> set[type]:
    return set(map(type, values))  # loops in C, for long arrays


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(issubclass(kind, str) for kind in _kinds(value))


def is_delays(value: object) -> bool:
    """Whether a value is valid for ``retries``."""
    return (
        isinstance(value, list)
        and _kinds(value) <= {int}
        and min(value, default=0) >= 0
        and max(value, default=0) <= SECONDS_LIMIT
    )


def _is_objects(value: object) -> bool:
    return isinstance(value, list) and all(issubclass(kind, dict) for kind in _kinds(value))


def _is_dkim(value: object) -> bool:
    """Whether a value has the form of keys; `mailerq.rules.signing` reads them."""
    objects = value if isinstance(value, list) else [value]
    return all(
        isinstance(each, dict)
        and all(isinstance(each.get(name), str) for name in ("domain", "selector", "key"))
        for each in objects
    )


def _is_queues(value: object) -> bool:
    return isinstance(value, dict) and all(
        name is None or isinstance(name, str) for name in value.values()
    )


MAIL: Final = "The mail"
DELIVERY: Final = "Delivery"
RESULTS: Final = "Results and reports"
WRITTEN: Final = "Written by the server"
UNUSED: Final = "Without effect yet"

PROPERTIES: Final = (
    Property(
        "recipient", MAIL, "a string",
        "The address for RCPT TO, without angle brackets. Every message needs one.", _is_str,
    ),
    Property(
        "envelope", MAIL, "a string",
        "The address for MAIL FROM. Empty or absent: the null sender.", _is_str,
    ),
    Property(
        "mime", MAIL, "a string or an object",
        "The whole mail, header and body, with CRLF between its lines. Or an object of which the"
        " mail is made; see below.", _is_dict,
        (
            Key("from", "The author: a string, or an object with `name` and `address` (or `email`)."
                " Absent: `envelope`."),
            Key("to", "The same, or an array. Absent: `recipient`."),
            Key("cc", "The same, or an array."),
            Key("subject", "The subject, a string."),
            Key("text", "The plain text, a string."),
            Key("textVersion", "The older name of `text`."),
            Key("content", "The HTML text, a string. An object makes the message fail."),
            Key("headers", "More header fields: each name with a string or an array of strings."),
            Key("attachments", "An array of objects with `name`, `type`, and `data` (base64) or"
                " `content` (text). A `url` makes the message fail."),
            Key("background", "The background of the HTML text.", used=False),
        ),
    ),
    Property(
        "key", MAIL, "a string",
        "The key of the mail in the storage of `storage-address`, in place of `mime`; see"
        " [storage.md](storage.md).", _is_str,
    ),
    Property(
        "mime-base64", MAIL, "a string",
        "Stands in place of `mime` where the mail is not valid UTF-8.",
    ),
    Property(
        "data", MAIL, "an object",
        "Variables: with them, the mail is a template; see below.", _is_dict,
    ),
    Property(
        "headers", MAIL, "an object",
        "Edits of the header. Each name stands for a string or an array of strings; case does not"
        " matter. The edits are made in the order of this table.", _is_dict,
        (
            Key("remove", "A name or an array of names: the fields to remove."),
            Key("replace", "Fields in place of the first of their name; others of that name are"
                " removed. Where there is none, the field is added."),
            Key("update", "The same, but nothing is added."),
            Key("prepend", "Fields to add at the top."),
            Key("append", "Fields to add at the end."),
            Key("add", "Another name of `append`."),
        ),
    ),
    Property(
        "inlinecss", MAIL, "true or false",
        "Moves the rules of `style` elements in HTML parts into the elements. Needs css-inline.",
        _is_flag,
    ),
    Property(
        "normalize", MAIL, "true or false",
        "Turns bare CRs and LFs into CRLF before plugins see the mail. On the wire that happens"
        " anyway.", _is_flag,
    ),
    Property(
        "smtputf8", MAIL, "true or false",
        "The mail needs SMTPUTF8 (RFC 6531), unless its header is ASCII.", _is_bool,
    ),
    Property(
        "requiretls", MAIL, "true or false",
        "The mail must not travel without TLS (RFC 8689): only to hosts that their domain proves by"
        " MTA-STS or DNSSEC, that have a valid certificate, and that promise the same. Mail of the"
        " null sender goes to others too, rather than being lost.", _is_bool,
    ),
    Property(
        "tlsrequired", MAIL, "true or false",
        "false: the mail rather arrives without TLS than not at all, so what the recipient's domain"
        " has published about TLS does not count. The server sets this for mail with the field"
        " `TLS-Required: No` (RFC 8689) and without `requiretls`.", _is_bool,
    ),
    Property(
        "binarymime", MAIL, "true or false",
        "The mail may be binary (RFC 3030). Peers that offer BINARYMIME get it byte for byte; for"
        " other peers the message fails if the mail cannot be sent as lines.",
        _is_bool,
    ),
    Property(
        "dkim", MAIL, "an object or an array of objects, with domain, selector and key",
        "Keys that sign the mail, beside those of the settings: an object, or an array of objects;"
        " docs/signing.md explains them.", _is_dkim,
        (
            Key("domain", "The domain that signs: `d=`. Required."),
            Key("selector", "The selector: `s=`. Required."),
            Key("key", "The private key in PEM, RSA or Ed25519. Required. Results do not have it."),
            Key("expire", "How long the signature is valid, in seconds, or the time when it ends."),
            Key("headers", "An array of names: more fields to sign, where the mail has them."),
            Key("report", "true: asks for reports of failures (RFC 6651)."),
            Key("protocols", "An array of `dkim` and `arc`: what the key is for. Absent: `dkim`."),
            Key("priority", "A number: the signature with a lower one stands nearer to the top."),
            Key("canonicalization", "Such as `relaxed/relaxed`. Absent: `relaxed/simple`."),
        ),
    ),
    Property(
        "delayed", DELIVERY, "a time",
        "The time before which the message is not sent. The server sets it to the time of the next"
        " attempt.", _is_str,
    ),
    Property(
        "maxdelivertime", DELIVERY, "a time",
        "The time when the message is given up. Absent: `max-delivertime` after `seen`.", _is_str,
    ),
    Property(
        "maxattempts", DELIVERY, "a whole number",
        "Attempts before the message fails; 0: no limit. Absent: `max-attempts`.", _is_int,
    ),
    Property(
        "retries", DELIVERY, "an array of seconds",
        "The waits between attempts; the last one repeats, and 0 is 1. Absent: `retry-interval`.",
        is_delays,
    ),
    Property(
        "ips", DELIVERY, "an array of strings",
        "Addresses of this host to send from; each attempt uses one of them.",
        _is_strings,
    ),
    Property(
        "priority", DELIVERY, "a whole number",
        "From 0, the default, to 255: mail of a higher one goes before other mail that waits for"
        " the same destination or the same hosts.", _is_int,
    ),
    Property(
        "pool", DELIVERY, "a string",
        "The name of a pool of such addresses, in `addresses-file`; of no effect beside `ips`.",
        _is_str,
    ),
    Property(
        "smarthost", DELIVERY, "an object",
        "The host to deliver to, in place of the MX of the domain and of the setting `smarthost`.",
        _is_dict,
        (
            Key("hostname", "Its name or address. Required."),
            Key("name", "The older name of `hostname`."),
            Key("port", "Its port, a number or a string. Absent: 25."),
            Key("username", "The login there, if any."),
            Key("password", "Its password. The documents in result queues do not have it."),
            Key("secure", "TLS to the host: `none`, `opportunistic`, `required` or `verified`, in"
                " addition to what the settings demand."),
        ),
    ),
    Property(
        "dsn", DELIVERY, "an object",
        "The reports that the sender wants (RFC 3461); see [bounces.md](bounces.md). Peers that"
        " offer DSN get these values; invalid values are left out.", _is_dict,
        (
            Key("notify", "NOTIFY of RCPT: `NEVER`, or of `SUCCESS,FAILURE,DELAY`. Absent:"
                " `dsn-notify`."),
            Key("ret", "RET of MAIL: `FULL` or `HDRS`. Absent: `dsn-ret`."),
            Key("orcpt", "ORCPT of RCPT: `rfc822;address`, or `utf-8;address` (RFC 6533)."),
            Key("envid", "ENVID of MAIL."),
            Key("envelope", "The address in From of reports. Absent: `dsn-envelope`."),
            Key("mta", "The host that reports name as their maker. Absent: `dsn-mta`."),
        ),
    ),
    Property(
        "verp", DELIVERY, "true, false or an address",
        "Whether MAIL FROM is a signed return address (VERP), made of `envelope` or of this"
        " address. Absent: if the domain of `envelope` is in `verp-domains`.", _is_verp,
    ),
    Property(
        "security", DELIVERY, "optional, opportunistic, required or verified",
        "TLS for this message, in addition to what the settings demand: `required` any TLS,"
        " `verified` with a certificate that is valid for the host. `optional` does without TLS"
        " where nothing demands it. See [security.md](security.md).", _is_security,
    ),
    Property(
        "queues", RESULTS, "an object of queue names",
        "Queues for the results of this message, in place of the configured ones. An absent name"
        " leaves the configured queue; null or an empty name: none. The outbox is refused, except"
        " for `dsn`, and so are its parts, such as `outbox.wait.60`.",
        _is_queues,
        (
            Key("results", "Gets every final result, in place of `rabbitmq-results`."),
            Key("success", "Gets the delivered mail, in place of `rabbitmq-success`."),
            Key("failure", "Gets the failed mail, in place of `rabbitmq-failure`."),
            Key("retry", "Gets a copy for each retry, in place of `rabbitmq-retry`."),
            Key("dsn", "Gets the reports to the sender, in place of `rabbitmq-dsn`; null or an"
                " empty name: no reports."),
        ),
    ),
    Property(
        "keepmime", RESULTS, "true or false",
        "Result documents keep `mime` or `key`; `mime` not in the queue `failure` where"
        " `rabbitmq-failure` is not set.", _is_flag,
    ),
    Property(
        "tags", RESULTS, "an array of strings",
        "Labels. They appear in the send log and in the results.", _is_strings,
    ),
    Property(
        "results", WRITTEN, "an array of objects",
        "The outcome of each attempt, oldest first.", _is_objects,
        (
            Key("attempt", "The number of the attempt, from 1."),
            Key("type", "What happened, in the words of version 2.1; see below."),
            Key("state", "How far the attempt came, in the words of version 2.1; see below."),
            Key("result", "What happened, in the newer words; see below."),
            Key("time", "When the attempt ended."),
            Key("mta", "The name in the peer's banner."),
            Key("authentication", "The mechanism of AUTH, if a login was used: `plain`."),
            Key("from", "The address of this host."),
            Key("to", "The address of the peer."),
            Key("cipher", "The TLS of the connection: `name` of the cipher, `bits`, and `version`"
                " of TLS."),
            Key("certificate", "The peer's certificate: `verified` is true if it was checked and"
                " is valid; `subject`, `issuer`, `notbefore`, `notafter`, `altnames`,"
                " `self-signed`."),
            Key("messages", "The messages on that connection so far, including this one."),
            Key("code", "The code of the reply, from the peer or generated here."),
            Key("status", "The enhanced status code of the reply."),
            Key("description", "The text of the reply, or what went wrong."),
            Key("class", "What the reply means, by a pattern of `responses-file`."),
            Key("rule", "The name of that pattern."),
        ),
    ),
    Property(
        "message-id", WRITTEN, "a string",
        "The id of the message in logs and replies. An existing id is kept.",
    ),
    Property("domain", WRITTEN, "a string", "The domain of the recipient."),
    Property(
        "seen", WRITTEN, "a time",
        "When the message first became due in the outbox; `max-delivertime` starts here.",
    ),
    Property(
        "paused", WRITTEN, "a whole number",
        "The id of the pause that the message waits for; see `mailerq pause`.",
    ),
    Property(
        "forcedip", WRITTEN, "a string",
        "The address that the next attempt leaves from, of several that it may use: the last one"
        " left from there, and its peer said to try again later.",
    ),
    Property(
        "handover", WRITTEN, "an object",
        "How often instances of a cluster have handed the message over for its next attempt,"
        " because another one has its address: `attempt` and `count`.",
    ),
    Property(
        "refusedips", WRITTEN, "a list of strings",
        "Addresses that the next attempt does not leave from: peers have refused the message for"
        " them, and a pattern says `other-ip`.",
    ),
    Property(
        "dsn-delayed", WRITTEN, "a time", "When the sender was told that the message waits.",
    ),
    Property(
        "dsn-of", WRITTEN, "an object",
        "The message that this one, a report to its sender, is about.",
        keys=(
            Key("message-id", "The id of that message, or of the first of several recipients."),
            Key("event", "What is reported: `failed`, `delayed`, `delivered` or `relayed`."),
            Key("double", "The report is about a report, and goes to `dsn-double-bounce`."),
        ),
    ),
    Property("received", WRITTEN, "a time", "When the mail was received or injected."),
    Property("hostname", WRITTEN, "a string", "The name of the server that accepted the mail."),
    Property(
        "connection", WRITTEN, "an object", "The SMTP connection that brought the mail.",
        keys=(
            Key("local-ip", "The address of the server."),
            Key("local-port", "The port of the server."),
            Key("remote-ip", "The address of the client, behind a proxy as well."),
            Key("remote-port", "The port of the client."),
            Key("secure", "Whether TLS was in use."),
            Key("user", "The login of the client, if there was one."),
        ),
    ),
    Property(
        "cli", WRITTEN, "an object", "The command line that injected the mail.",
        keys=(
            Key("command", "The program."),
            Key("arguments", "Its arguments."),
            Key("user", "The account that ran it."),
        ),
    ),
    Property(
        "report", WRITTEN, "an object",
        "What a mail in the queue of `rabbitmq-reports` says about other mail; see"
        " [reports.md](reports.md). What is not known is absent.",
        keys=(
            Key("type", "The type of the report, such as `delivery-status` or `complaint`."),
            Key("action", "`failed`, `delayed`, `delivered`, `relayed` or `expanded`."),
            Key("status", "The enhanced status code."),
            Key("code", "The code of the reply in `diagnostic`."),
            Key("recipient", "The recipient that the report is about, in its words."),
            Key("original-recipient", "The same, as the mail was sent to."),
            Key("diagnostic", "The reply of the host, or what went wrong."),
            Key("remote-mta", "The host that gave the reply."),
            Key("reporting-mta", "The host that made the report."),
            Key("received-from-mta", "The host that the reporting host got the mail from."),
            Key("arrival", "When the reporting host got the mail."),
            Key("last-attempt", "When delivery was last tried."),
            Key("retry-until", "How long delivery will be tried."),
            Key("log-id", "The id of the mail at its final host."),
            Key("recipients", "All recipients that the report is about, if there are several: an"
                " array of at most 100 objects with the keys above."),
            Key("recipient-count", "How many recipients there are, if there are several."),
            Key("matched-by", "What names the mail that the report is about: `verp`, `envid`,"
                " `trace`, `received`, `message-id` or `recipient`."),
            Key("proved", "Whether a signature of this server proves that."),
            Key("message-id", "The id of our message, if it is known."),
            Key("verp", "What the return address says: `verified`, and `recipient`, `envelope`,"
                " `digest`, or a `problem`."),
            Key("trace", "What the trace field says: the `recipient` of our message."),
            Key("envid", "The ENVID of our message."),
            Key("original", "The header of that mail: `message-id`, `subject`, `from`, `to`,"
                " `date`."),
            Key("feedback-type", "The kind of a complaint: `abuse`, `fraud`, `auth-failure` or"
                " another."),
            Key("user-agent", "The program that made the report."),
            Key("source-ip", "The address that the mail of a complaint came from."),
            Key("original-sender", "The envelope sender of that mail."),
            Key("reported-domain", "The domain that a complaint is about."),
            Key("incidents", "How many complaints the report stands for."),
            Key("auth-failure", "What failed: `dkim`, `spf`, `bodyhash` or another."),
            Key("delivery-result", "What became of that mail."),
            Key("disposition", "What was done with the mail: `displayed`, `deleted` or another."),
            Key("mode", "Whether a person or a program did that."),
            Key("error", "Why the mail could not be shown."),
            Key("auto-submitted", "The mark of an automatic reply."),
            Key("subject", "The subject of an automatic reply."),
            Key("tls", "What a TLS report says."),
            Key("dmarc", "What the name of an aggregate report says: `domain`, `submitter`,"
                " `report-id`, `begin`, `end`, `file`."),
            Key("problem", "Why a part of the report cannot be read."),
        ),
    ),
    Property(
        "damaged", WRITTEN, "an object",
        "Why the message was set aside, in the queue for damaged messages.",
        keys=(Key("reason", "The reason as text."),),
    ),
    Property("nextattempt", UNUSED, "an object", "A newer form of `delayed`.", used=False),
    Property("force", UNUSED, "true or false", "Attempts delivery despite errors.", used=False),
    Property("checks", UNUSED, "an array of objects", "The findings of checks on received mail.",
             used=False),
    Property("extracted", UNUSED, "an object", "Parts of the header, in results.", used=False),
    Property("spool", UNUSED, "an object", "The file that brought the mail.", used=False),
    Property("http", UNUSED, "an object", "The HTTP request that brought the mail.", used=False),
)  # fmt: skip
"""The table in reading order. The properties of a group are adjacent."""

KNOWN: Final = {known.name: known for known in PROPERTIES}

CHECKS: Final = tuple(
    (known.name, known.check, known.expected) for known in PROPERTIES if known.check is not None
)

CHECK_OF: Final = {name: check for name, check, _ in CHECKS}

_SPELLING: Final = Spelling(KNOWN)
_OBJECTS: Final = tuple(
    (known.name, Spelling(key.name for key in known.keys))
    for known in PROPERTIES
    if known.keys and known.group != WRITTEN
)
_NAMES_OF_OBJECTS: Final = frozenset(name for name, _ in _OBJECTS)

REMEMBERED_LIMIT: Final = 1000
REMEMBERED_LENGTH: Final = 1000
"""Limits of `_well_spelt`: sets of names, and characters in a set. Applications add the same
properties to all their messages, and checking each name for a slip takes long."""

_well_spelt: Final[dict[tuple[str, ...], None]] = {}


def misspellings(properties: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Return each unknown name that is one slip away from a known name, with the known name.

    Keys of an object such as ``queues`` are written ``queues.success``. At most `UNKNOWN_LIMIT`
    names of each object are checked.

    >>> list(misspellings({"recipeint": "a@b.test", "my-id": 7, "queues": {"sucess": None}}))
    [('recipeint', 'recipient'), ('queues.sucess', 'queues.success')]
    """
    if not _NAMES_OF_OBJECTS.isdisjoint(properties):
        return _misspellings(properties)
    names = tuple(properties)
    if names in _well_spelt:
        return ()
    found = list(_misspellings(properties))
    if not found and sum(map(len, names)) <= REMEMBERED_LENGTH:
        if len(_well_spelt) >= REMEMBERED_LIMIT:
            _well_spelt.clear()
        _well_spelt[names] = None
    return found


def _misspellings(properties: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    unknown = [name for name in properties if name not in KNOWN]
    for name in unknown[:UNKNOWN_LIMIT]:
        if meant := _SPELLING.meant(name):
            yield name, meant
    for outer, spelling in _OBJECTS:
        value = properties.get(outer)
        if isinstance(value, dict):
            for name in islice(value, UNKNOWN_LIMIT):
                if meant := spelling.meant(name):
                    yield f"{outer}.{name}", f"{outer}.{meant}"
