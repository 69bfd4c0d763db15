"""``mailerq rcpt@…``: inject one mail from stdin, as sendmail does.

The mail goes straight into the queue if this user may write there, otherwise through the configured
SMTP port. With exit status 0 the mail is safe; with any other status nothing was accepted. The
common switches of sendmail work; -bs, -bp, -bi and -q select other commands.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO, Final

from mailerq import ids
from mailerq.address import parse_mailbox
from mailerq.cli import control
from mailerq.cli.common import Parser, complain, print_json
from mailerq.config import Config
from mailerq.errors import AddressError, ConfigError, MessageError, QueueError
from mailerq.mail import headers, incoming
from mailerq.mail.headers import Header
from mailerq.mail.recipients import addresses, recipients, sender
from mailerq.queues import Publication
from mailerq.rules.access import Access
from mailerq.rules.routes import reception_queue
from mailerq.wire._lines import Buffer

__all__ = ["Refused", "hand_over", "main"]

READ_BYTES: Final = 1 << 16

LINE_END: Final = re.compile(rb"\r\n").search
LINE_END_BYTE: Final = re.compile(rb"[\r\n]").search

ASK_SECONDS: Final = 1.0
"""Timeout for asking the daemon for ids and for waking it; the mail does not depend on it."""

SMTP_SECONDS: Final = 300.0
"""Timeout of one reply."""

DESCRIPTION: Final = """\
Read one mail from stdin and put it into the queue. Its lines may end with LF or CRLF. The
mail ends with a line that holds a single dot, or with --ignore-dot at the end of the input.
The common switches of sendmail work too. Instead of a recipient: -bs (SMTP on stdin and
stdout), -bp (list waiting mail, as mailq does) and -q (try waiting mail now).
"""

EXITS: Final = """\
exit status: 0 the mail is safe, 64 wrong usage, 65 the mail cannot be used, 67 a recipient was
refused, 69 the mail was refused, 75 try again later, 77 not allowed, 78 wrong configuration
"""


class Refused(Exception):
    """The mail was not accepted. The text says why; `status` is the exit status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def main(settings: list[str], rest: list[str]) -> int:
    """Inject one mail, or run the command that a switch selects."""
    options = _parse(rest)
    if options.mode == "p" or options.flush:
        from mailerq.cli import queue

        words = ["show", "--mailq"] if options.mode == "p" else ["flush", "--quiet"]
        return queue.main(settings, [*words, *(["--json"] if options.json else [])])
    if options.mode == "i":
        return os.EX_OK  # mailerq has no aliases to rebuild
    try:
        config = Config.load(settings)
    except ConfigError as error:
        for problem in error.problems:
            complain(str(problem))
        return os.EX_CONFIG
    if options.mode == "s":
        from mailerq.cli import dialogue

        return dialogue.serve(config, partial(hand_over, config, rest))
    try:
        _inject(config, options, rest)
    except Refused as refused:
        complain(str(refused))
        return refused.status
    return os.EX_OK


def _parse(rest: list[str]) -> Namespace:
    parser = Parser(
        prog="mailerq",
        usage="mailerq [--envelope A] [--extract-recipients] [--ignore-dot] [recipient …] <mail",
        description=DESCRIPTION,
        epilog=EXITS,
    )
    add = parser.add_argument
    # fmt: off
    add("recipients", nargs="*", metavar="recipient", help="a recipient of the mail")
    add("--envelope", "-f", "-r", metavar="A", help="address for MAIL FROM; <> for none")
    add("--extract-recipients", "-t", action="store_true",
        help="also send the mail to the addresses in To, Cc and Bcc")
    add("--ignore-dot", "-i", action="store_true",
        help="do not end the mail at a line with a single dot")
    add("--json", action="store_true", help="print the result as JSON")
    # Switches of sendmail that have no effect here.
    add("-o", action="append", default=[], help=SUPPRESS)
    add("-F", dest="full_name", help=SUPPRESS)
    add("-b", dest="mode", choices="mspi", default="m", help=SUPPRESS)
    add("-q", dest="flush", nargs="?", const=True, help=SUPPRESS)
    for letter in "ABNRVhpL":
        add(f"-{letter}" if letter != "h" else "-hops", dest="ignored", help=SUPPRESS)
    for letter in "nmvGU":
        add(f"-{letter}", dest="ignored", action="store_true", help=SUPPRESS)
    # fmt: on
    options = parser.parse_args(rest)
    if options.flush not in (None, True):
        parser.error(f"-q{options.flush} is not supported; a daemon tries again by retry-interval")
    if "i" in options.o:
        options.ignore_dot = True
    wants_mail = options.mode == "m" and not options.flush
    if wants_mail and not options.recipients and not options.extract_recipients:
        parser.error("name a recipient, or use --extract-recipients")
    return options


def _inject(config: Config, options: Namespace, rest: Sequence[str]) -> None:
    user = _user()
    mail = _read(sys.stdin.buffer, config.smtp_maxsize, ignore_dot=options.ignore_dot)
    with memoryview(mail) as view:
        head = headers.head_of(view)
    header = Header(head)
    if not header.is_whole:
        raise Refused(os.EX_DATAERR, f"the mail {incoming.Problem.HEADER}")
    recipients = _recipients(header, options, config)
    sender = _sender(header, options, config, user)
    mail.replace(len(head), _complete(head, header, sender, options))
    del head, header
    result = hand_over(config, rest, mail, sender, recipients)
    if options.json:
        print_json(result)


def hand_over(
    config: Config, words: Sequence[str], mail: Buffer, sender: str, recipients: Sequence[str]
) -> dict[str, Any]:
    """Store a mail in the queue, or send it to the port; return the result for --json.

    `words` is the command line, which is recorded in the message. `mail` is empty afterwards.
    Raises `Refused`.
    """
    if not os.access(config.queue_directory, os.W_OK | os.X_OK):
        return _by_smtp(config, mail.take(), sender, recipients)
    user = _user()
    command, *arguments = [_printable(word) for word in (sys.argv[0], *words)]
    cli = {"command": command, "arguments": arguments, "user": user}
    envelope = incoming.Envelope(sender, recipients, {"cli": cli}, user=user, trusted=True)
    return _into_queue(config, mail, envelope)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _printable(word: str) -> str:
    """Make an argument valid for JSON: bytes that are not UTF-8 arrive as lone surrogates."""
    return word.encode(errors="surrogateescape").decode(errors="replace")


# The mail and its envelope.


def _read(file: BinaryIO, limit: int, *, ignore_dot: bool) -> Buffer:
    """Read the mail up to the final dot, convert line ends to CRLF and unstuff dots.

    A first line "From …", which belongs to mailbox files, is removed.
    """
    mail = Buffer()
    window = b"\n"  # so that a dot on the first line follows a line end, too
    size = 0
    ended = False
    while not ended:
        data = os.read(file.fileno(), READ_BYTES)
        window += data
        size += len(data)
        cut = len(window)
        if not data:
            ended = True
            if not ignore_dot and window.endswith(b"\n."):
                cut -= 1
                size -= 1
        else:
            ends = [] if ignore_dot else [window.find(mark) for mark in (b"\n.\n", b"\n.\r\n")]
            if max(ends, default=-1) >= 0:
                ended = True
                size -= cut
                cut = min(end for end in ends if end >= 0) + 1
                size += cut
            else:
                cut = _certain(window)
        if size > limit:
            raise Refused(os.EX_DATAERR, f"the mail is larger than smtp-maxsize ({limit} bytes)")
        _add_lines(mail, window[:cut], ignore_dot=ignore_dot)
        window = window[cut:]
    with memoryview(mail) as view:
        first, last = bytes(view[2:8]), bytes(view[-2:])
        start = 2  # after the line end that `window` started with
        if first.startswith((b"From ", b">From ")):
            found = LINE_END(view, 2)
            start = found.end() if found else len(mail)
            del found
    is_open = last != b"\r\n"
    mail.replace(start, b"")
    if is_open and len(mail):
        mail.add(b"\r\n")
    return mail


def _certain(window: bytes) -> int:
    """Return the size of `window` without a last line end that could start the final dot."""
    found = LINE_END_BYTE(window, max(len(window) - 4, 0))
    if found is None:
        return len(window)
    cut = found.start()
    return cut - 1 if window[cut - 1 : cut] == b"\r" else cut


def _add_lines(mail: Buffer, text: bytes, *, ignore_dot: bool) -> None:
    """Convert and add text that starts with a line end, or continues a line."""
    text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not ignore_dot:
        text = text.replace(b"\n..", b"\n.")
    mail.add(text.replace(b"\n", b"\r\n"))


def _recipients(header: Header, options: Namespace, config: Config) -> list[str]:
    found: list[str] = []
    try:
        for argument in options.recipients:
            if "\n" in argument or "\r" in argument:
                raise AddressError(f"{argument[:80]!a} is more than one line")
            found += addresses(argument)
        found = [_qualified(address, config) for address in found]
    except AddressError as error:
        raise Refused(os.EX_USAGE, str(error)) from None
    if options.extract_recipients:
        try:
            found += [_qualified(address, config) for address in recipients(header)]
        except AddressError as error:
            raise Refused(os.EX_DATAERR, str(error)) from None
    if not found:
        raise Refused(os.EX_DATAERR, "no recipient is named, neither here nor in To, Cc or Bcc")
    found = list(dict.fromkeys(found))
    if len(found) > config.smtp_maxrecipients:
        limit = f"smtp-maxrecipients ({config.smtp_maxrecipients})"
        raise Refused(os.EX_DATAERR, f"{len(found)} recipients are more than {limit}")
    return found


def _sender(header: Header, options: Namespace, config: Config, user: str) -> str:
    """Return the address for MAIL FROM: from --envelope, the header, or the user."""
    if options.envelope is not None:
        address = options.envelope.strip().removeprefix("<").removesuffix(">")
        status = os.EX_USAGE
    else:
        found = sender(header)
        address = user if found is None else found
        status = os.EX_DATAERR
    try:
        return _qualified(address, config) if address else ""
    except AddressError as error:
        raise Refused(status, str(error)) from None


def _qualified(address: str, config: Config) -> str:
    """Add this host as the domain if an address has none. Raises `AddressError`."""
    if "@" not in address:
        address = f"{address}@{config.hostname}"
    parse_mailbox(address)
    return address


def _complete(mime: bytes, header: Header, sender: str, options: Namespace) -> bytes:
    """Add required fields (RFC 5322, section 3.6), and remove private ones."""
    private = {b"bcc", b"resent-bcc", b"return-path"}
    if options.envelope is not None:
        private.add(b"x-mq-envelope")  # --envelope takes precedence
    fields = []
    if not header.has(b"from") and sender:
        fields.append(_from_field(sender, options.full_name or ""))
    if not header.has(b"date"):
        fields.append(headers.date_field(time.time()))
    left_out = [field for field in header.fields() if field.name in private]
    if left_out:
        mime = headers.remove(mime, left_out)
    return headers.prepend(mime, *fields) if fields else mime


def _from_field(sender: str, full_name: str) -> bytes:
    name = "".join(char for char in full_name if char.isprintable())
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    text = f'"{quoted}" <{sender}>' if name else sender
    return f"From: {text}\r\n".encode(errors="replace")


# The two ways to the queue.


def _ids(config: Config, count: int) -> Iterator[str]:
    """Return message ids of the daemon, whose plugins may supply them, or of the core."""
    try:
        reply = control.ask(config.queue_directory, "message-ids", timeout=ASK_SECONDS, count=count)
        return iter(reply["ids"])
    except (OSError, KeyError):  # no daemon runs, or an older one without this request
        ids.set_machine(config.server_id, config.hostname)
        return iter(ids.new_id, None)


def _into_queue(config: Config, mail: Buffer, envelope: incoming.Envelope) -> dict[str, Any]:
    """Store the mail, one message for each recipient, and wake the daemon."""
    from mailerq.queues.opening import publish

    with memoryview(mail) as view:
        head = headers.head_of(view)
    reception = incoming.messages(
        head,
        envelope,
        hostname=config.hostname,
        now=time.time(),
        next_id=_ids(config, len(envelope.recipients)).__next__,
        outbox=config.rabbitmq_outbox,
    )
    if isinstance(reception, incoming.Problem):
        raise Refused(os.EX_DATAERR, f"the mail {reception}")
    for reason in reception.ignored:
        complain(f"ignored {reason}")
    for name, meant in reception.doubtful:
        complain(f"{name} is not known and changes nothing; is {meant} meant?")
    mail.replace(len(head), reception.messages[0].body or b"")
    body = mail.take()
    for message in reception.messages:
        message.body = body
    is_local = _locals(config)
    publications = [
        Publication(queue, message)
        for message in reception.messages
        if (queue := reception_queue(config, local=is_local(message.recipient)))
    ]
    if publications:
        try:
            publish(config, publications)
        except QueueError as error:
            raise Refused(os.EX_TEMPFAIL, str(error)) from None
        except MessageError as error:
            raise Refused(os.EX_DATAERR, str(error)) from None
        try:
            control.ask(config.queue_directory, "wake", timeout=ASK_SECONDS)
        except OSError:
            pass  # no daemon runs; the next one finds the mail
    return {
        "via": "queue",
        "messages": [
            {"message-id": message.properties["message-id"], "recipient": message.recipient}
            for message in reception.messages
        ],
    }


def _locals(config: Config) -> Callable[[str], bool]:
    """Return a test for local recipients; false for all without a queue for local mail."""
    if not config.rabbitmq_local:
        return lambda recipient: False
    from mailerq.inbound.addresses import LocalAddresses, is_local

    try:
        listed = LocalAddresses.of(config)
    except ConfigError as error:
        raise Refused(os.EX_CONFIG, str(error)) from None
    return partial(is_local, access=Access.of(config), listed=listed)


def _by_smtp(config: Config, mime: bytes, sender: str, recipients: Sequence[str]) -> dict[str, Any]:
    """Send the mail to the configured port. Either all recipients are accepted, or none."""
    import smtplib

    from mailerq.wire.framing import encode_body

    host = next((ip for ip in config.smtp_ip if ip not in ("0.0.0.0", "::")), "127.0.0.1")
    port = config.smtp_port[0] if config.smtp_port else 0
    where = f"{host} port {port}"
    directory = config.queue_directory
    lack = "is not writable for this user" if os.path.isdir(directory) else "is not there yet"
    try:
        paths = [_path(address) for address in (sender, *recipients)]
        if not all(path.isascii() for path in paths):
            raise Refused(os.EX_UNAVAILABLE, f"{where} takes no address that is not ASCII")
        with smtplib.SMTP(timeout=SMTP_SECONDS, local_hostname=config.hostname) as client:
            _expect(220, client.connect(host, port), where, os.EX_UNAVAILABLE)
            client.ehlo_or_helo_if_needed()
            options = [] if mime.isascii() else ["BODY=8BITMIME"]
            _expect(250, client.mail(paths[0], options), where, os.EX_UNAVAILABLE)
            for path in paths[1:]:
                _expect(250, client.rcpt(path), f"{where}: <{path}>", os.EX_NOUSER)
            _expect(354, client.docmd("DATA"), where, os.EX_UNAVAILABLE)
            blocks, end = encode_body(mime)
            for block in blocks:
                client.send(block)
            client.send(end)
            code, text = client.getreply()
            _expect(250, (code, text), where, os.EX_UNAVAILABLE)
    except smtplib.SMTPResponseException as error:
        reply = (error.smtp_code, error.smtp_error)
        _expect(250, reply, where, os.EX_UNAVAILABLE)
    except (OSError, smtplib.SMTPException) as error:
        raise Refused(
            os.EX_TEMPFAIL,
            f"the mail cannot be kept now: {directory} {lack}, "
            f"and {where} does not answer ({getattr(error, 'strerror', None) or error})",
        ) from None
    return {"via": "smtp", "recipients": list(recipients), "reply": text.decode(errors="replace")}


def _path(address: str) -> str:
    """Return the address, with its domain in ASCII."""
    return str(parse_mailbox(address)) if address else ""


def _expect(wanted: int, reply: tuple[int, bytes | str], where: str, status: int) -> None:
    code, text = reply
    if code == wanted:
        return
    words = text.decode(errors="replace") if isinstance(text, bytes) else text
    temporary = not 500 <= code < 600
    raise Refused(os.EX_TEMPFAIL if temporary else status, f"{where} says {code} {words}")
