"""``mailerq explain``: what would be decided about mail to an address or a domain, and why.

A running daemon answers with the settings in force, and with what it does now. Without one the
command reads the settings and asks the DNS itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from mailerq.address import parse_ip
from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, print_json, print_table
from mailerq.config import Config
from mailerq.errors import QueueError, RowError, StoreError
from mailerq.escaping import escape
from mailerq.message import format_time

if TYPE_CHECKING:
    from mailerq.rules.rows import Rows

__all__ = ["main"]

DESCRIPTION: Final = """\
Explain what would be decided about mail to an address or a domain now: whether it goes out, to
which hosts, from which addresses, under which limits, and which line of which file says so. With
a running daemon also: which limit holds it now, and until when.

Exit status: 0 mail goes out, or to a local queue; 1 it would fail, or cannot go now."""

PENDING_SECONDS: Final = 30.0
"""How long the name servers may take."""

PENDING_INTERVAL: Final = 0.5

MAX_PATTERNS: Final = 10
"""Patterns of a policy that are shown; `mailerq sts` shows all."""

FAILING: Final = ("fail", "wait")
"""Decisions for which the exit status is 1."""

Answer = dict[str, Any]


def main(settings: list[str], rest: list[str]) -> int:
    """Explain, see DESCRIPTION."""
    parser = command_parser("explain", DESCRIPTION)
    parser.add_argument("recipient", metavar="DOMAIN|ADDRESS")
    parser.add_argument("--from", dest="envelope", metavar="ADDRESS", default="", help="the sender")
    parser.add_argument(
        "--ip", action="append", default=[], metavar="ADDRESS",
        help="a local address that the message names in ips; may be given several times",
    )  # fmt: skip
    parser.add_argument("--pool", metavar="NAME", default="", help="a pool that the message names")
    parser.add_argument(
        "--tag", action="append", default=[], metavar="TAG",
        help="a tag that the message has; may be given several times",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options = parser.parse_args(rest)
    try:
        ips = [str(parse_ip(ip)) for ip in options.ip]
    except ValueError as error:
        parser.error(f"--ip: {error}")
    config = Config.load(settings)
    request = {
        "recipient": options.recipient,
        "envelope": options.envelope,
        "ips": ips,
        "pool": options.pool,
        "tags": options.tag,
    }
    try:
        answer = _ask(config, request)
    except PermissionError:
        complain(f"you may not ask the daemon on {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    if "error" in answer:
        complain(f"the daemon says: {answer['error']}")
        return os.EX_SOFTWARE
    _add_depth(config, answer)
    if options.json:
        print_json(answer)
    else:
        _show(answer)
    return 1 if answer["decision"] in FAILING else os.EX_OK


def _ask(config: Config, request: dict[str, Any]) -> Answer:
    """The answer of the daemon, or our own. Raises `PermissionError` and `ConfigError`."""
    end = time.monotonic() + PENDING_SECONDS
    while True:
        try:
            answer = control.ask(config.queue_directory, "explain", **request)
        except PermissionError:
            raise
        except OSError:
            return {**_alone(config, request), "live": False}
        if not answer.pop("pending", False) or time.monotonic() > end:
            return {**answer, "live": True}
        time.sleep(PENDING_INTERVAL)


def _alone(config: Config, request: dict[str, Any]) -> Answer:
    """The answer without a daemon. Raises `ConfigError`."""
    import trio

    from mailerq.engine import DAYS
    from mailerq.inbound.addresses import LocalAddresses
    from mailerq.inbound.explaining import explain_arrival
    from mailerq.live import Live
    from mailerq.net.dane import Dane
    from mailerq.net.https import Https
    from mailerq.net.resolver import Resolver
    from mailerq.outbound.explaining import Explainer, Question
    from mailerq.outbound.limits import Limits
    from mailerq.outbound.policies import Policies
    from mailerq.outbound.signer import Signer
    from mailerq.outbound.sites import Sites
    from mailerq.outbound.sts import StsPolicies
    from mailerq.outbound.warmup import Days
    from mailerq.rules.access import Access
    from mailerq.rules.plan import plan
    from mailerq.rules.reporting import read_keys
    from mailerq.rules.shaping import Shaping
    from mailerq.store.sts_file import StsFile

    question = Question.of(request)
    access, listed = Access.of(config), LocalAddresses.of(config)
    shaping = Shaping.of(config)
    limits = Limits(shaping)
    limits.days = Days(os.path.join(config.queue_directory, DAYS))
    rows = _rows(config, shaping.local_ips.pools)
    local = explain_arrival(
        question.recipient, config, access, listed, keys=read_keys(config), now=time.time()
    )
    if local is not None:
        return {**question.answer(), **local}

    def apart(domain: str) -> str:
        return "" if rows is None else rows.apart(domain)

    async def run() -> Answer:
        resolver = Resolver(config)
        file = StsFile(config.queue_directory, config.user)
        sts = StsPolicies(Live(config), resolver, Https(resolver.addresses), file, keeps=False)
        return await Explainer(
            config,
            limits,
            Sites(
                resolver,
                limits.shaping.group_of,
                apart,
                limits.shaping.ignores_policies,
                Policies(sts=sts, dane=Dane(resolver)),
            ),
            lambda message, now, seen: plan(
                message, config, now=now, seen=seen, rows=rows, local=limits.shaping.local_ips
            ),
            now=time.time,
            rows=rows,
            signer=Signer(Live(config)),
        ).explain(question)

    return _with_policy(config, trio.run(run))


def _with_policy(config: Config, answer: Answer) -> Answer:
    """The answer with the MTA-STS policy that is kept of the domain."""
    from mailerq.store.sts_file import Kept, StsFile

    if not config.mta_sts or answer.get("route", {}).get("by") != "MX records":
        return answer
    if not os.path.isdir(config.queue_directory):
        return answer
    try:
        entry = StsFile(config.queue_directory, config.user).get(answer["domain"])
    except StoreError as error:
        complain(f"the policies of MTA-STS cannot be read: {error}")
        return answer
    return answer if entry is None else {**answer, "mta-sts": Kept.of(entry).describe(time.time())}


def _rows(config: Config, pools: Mapping[str, Collection[str]]) -> Rows | None:
    """The operator's rows that a daemon would find."""
    from mailerq.rules.rows import Rows
    from mailerq.store.row_file import RowFile

    file = RowFile(config.queue_directory, config.user)
    try:
        while file.follow():
            pass
    except (OSError, RowError) as error:
        complain(f"the operator's rows cannot be read: {error}")
        return None
    if file.damaged:
        complain(f"{file.damaged} lines of the operator's rows are damaged: some may be missing")
    table = file.table
    table.expire(time.time())
    rows = Rows(table.rows.values(), addresses=table.addresses, domains=table.domains, pools=pools)
    return rows or None


def _add_depth(config: Config, answer: Answer) -> None:
    """How much mail waits under the same key, if this user may see that."""
    destination = answer.get("destination")
    if destination is None:
        return
    from mailerq.queues.opening import waiting_by_destination

    destination["messages"] = None
    try:
        waiting = waiting_by_destination(config)
        destination["messages"] = None if waiting is None else waiting.get(destination["key"], 0)
    except FileNotFoundError:
        destination["messages"] = 0
    except (OSError, QueueError):
        pass  # the rest of the answer is good


# For people


def _show(answer: Answer) -> None:
    print_table(("WHAT", "ANSWER", "WHERE"), list(_facts(answer)))
    if "hosts" in answer:
        sys.stdout.write("\n")
        keys = ("preference", "name", "address", "state")
        rows = [[host[key] for key in keys] for host in answer["hosts"]]
        print_table(("PREFERENCE", "HOST", "ADDRESS", "NOW"), rows)
    for part in answer.get("from", ()):
        sys.stdout.write(f"\nfrom {escape(_source(part))}\n")
        if paused := part.get("paused"):
            sys.stdout.write(f"  {escape(paused)}\n")
        for address, words in part.get("paused-hosts", {}).items():
            sys.stdout.write(f"  {escape(address)}: {escape(words)}\n")
        if problem := part.get("problem"):
            sys.stdout.write(f"  {escape(problem)}\n")
        for line in _security(part["security"]):
            sys.stdout.write(f"  {escape(line)}\n")
        if part["limits"]:
            rows = [[*_limit(limit)] for limit in part["limits"]]
            print_table(("LIMIT", "VALUE", "OF", "WHERE", "NOW"), rows)
        if part["actions"]:
            sys.stdout.write("\n")
            rows = [[action[key] for key in ACTION] for action in part["actions"]]
            print_table([key.upper() for key in ACTION], rows)
        for flow in part["flows"]:
            sys.stdout.write("\n")
            for name, value in _flow(flow):
                sys.stdout.write(f"{name:<20}{escape(str(value))}\n")


ACTION: Final = ("rule", "where", "stage", "since", "until", "hits", "sample")

WORDS: Final = {
    "send": "goes out",
    "done": "counts as delivered",
    "hold": "is held",
    "wait": "waits",
    "fail": "fails",
    "local": "stays here",
}


def _facts(answer: Answer) -> Iterator[tuple[str, object, str]]:
    """Rows of a fact, its value, and the place that says so."""
    name = answer["recipient"]
    reason, where = answer.get("reason", answer.get("until", "")), answer.get("where", "")
    yield "mail to " + name, WORDS[answer["decision"]] + (f": {reason}" if reason else ""), where
    if not answer["live"]:
        yield "daemon", "none answers: settings and DNS only", ""
    if (route := answer.get("route")) is not None:
        way = "the MX hosts of " if route["by"] == "MX records" else ""
        port = f", port {route['port']}" if route["port"] else ""
        protocol = f" by {route['protocol']}" if route["protocol"] != "SMTP" else ""
        login = f", logged in as {route['login']}" if route["login"] else ""
        yield "to", f"{way}{route['host']}{port}{protocol}{login}", route["where"]
        seconds = answer["expires"]
        yield "tried for", f"{seconds['after']:g} s", seconds["where"]
    if (site := answer.get("site")) is not None:
        apart = f", apart for lines about {site['apart']}" if site["apart"] else ""
        yield "site", site["label"] + apart, site["where"]
        if (provider := answer["provider"])["name"]:
            yield "provider", provider["name"], provider["where"]
    if (policy := answer.get("mta-sts")) is not None:
        yield "MTA-STS", _sts(policy), "mailerq sts"
    for host in answer.get("tlsa", ()):
        yield f"TLSA of {host['host']}", _tlsa(host), ""
    if (signing := answer.get("signing")) is not None:
        yield from _signing(signing)
    if (destination := answer.get("destination")) is not None:
        count, when = destination["messages"], destination.get("next")
        waiting = "unknown" if count is None else count
        yield f"waiting as {destination['key']}", waiting, f"next due {when}" if when else ""


def _sts(policy: Answer) -> str:
    problem = policy.get("problem")
    trouble = f"; the last fetch failed: {problem['text']}" if problem else ""
    if "id" not in policy:
        return f"no policy{trouble}"
    mode = policy["mode"] if policy["in-force"] else f"{policy['mode']}, expired"
    hosts = f", hosts {', '.join(policy['mx'][:MAX_PATTERNS])}" if policy["mx"] else ""
    times = f"fetched {policy['fetched']}, expires {policy['expires']}"
    return f"{mode}, id {policy['id']}, {times}{hosts}{trouble}"


def _tlsa(host: Answer) -> str:
    if problem := host.get("problem"):
        return str(problem)
    if host["base"] is None:
        return "none"
    at = "" if host["base"] == host["host"] else f" (at {host['base']})"
    return (", ".join(host["records"]) or "none is usable: TLS, without authentication") + at


def _signing(signing: Answer) -> Iterator[tuple[str, object, str]]:
    """The keys that sign mail of a From domain."""
    author = f"mail from {signing['from-domain']}"
    for key in signing["keys"]:
        words = f"d={key['domain']} s={key['selector']} a={key['algorithm']}"
        words += "" if key["in-force"] else ", not now"
        words += "" if "dkim" in key["protocols"] else ", for ARC only"
        yield f"{author} is signed by", words, key["where"]
    if not (signing["keys"] or signing["problems"]):
        yield author, "is not signed", ""
    action = "waits" if signing["missing"]["action"] == "defer" else "goes without the signature"
    for problem in signing["problems"]:
        yield f"{author} {action}", problem, signing["missing"]["where"]


def _source(part: dict[str, Any]) -> str:
    address = part["local-ip"] or "an address that the system chooses"
    weight = f", weight {part['weight']}" if part["weight"] != 1 else ""
    return f"{address}, as {part['ehlo']} ({part['ehlo-where']}){weight}"


def _security(part: dict[str, Any]) -> Iterator[str]:
    """Lines about TLS."""
    yield f"TLS: {part['demands']} ({part['where']}: {part['level']})"
    if part["mta-sts"]:
        yield f"TLS: {part['mta-sts']}"
    if part["dnssec"]:
        yield "TLS: DNSSEC proves the hosts, so their TLSA records count"
    elif part["dane"]:
        yield f"TLS: DNSSEC does not prove the hosts; {part['dane']}"
    if part["ignored"]:
        yield "TLS: limits-file says that what the domain has published does not count"
    for address in part["in-clear"]:
        yield f"TLS: failed with {address}, which gets mail in clear for now"


def _limit(limit: dict[str, Any]) -> Iterator[object]:
    is_time = limit["limit"] in ("paused", "closed")
    value = format_time(limit["value"]) if is_time else limit["value"]
    yield from (limit["limit"], value, limit["scope"], limit["where"])
    words = []
    if "used" in limit:
        words.append(f"{limit['used']} in use")
    if limit.get("until"):
        words.append(f"until {limit['until']} ({limit['seconds']:.2f} s)")
    elif limit.get("allowed"):
        words.append("allows more")
    if limit.get("waiting"):
        words.append(f"{limit['waiting']} wait")
    yield ", ".join(words)


def _flow(flow: dict[str, Any]) -> Iterator[tuple[str, object]]:
    if "process" in flow:
        yield "process", flow["process"]
    limit = flow["limited-by"] or "nothing"
    if flow["until"]:
        limit += f", until {flow['until']} ({flow['seconds']:.2f} s)"
    yield "waits for", limit
    yield "messages in memory", flow["memory"]
    yield "connections", f"{flow['connections']}, {flow['opening']} opening, {flow['idle']} idle"
    if flow["reply"]:
        yield "last reply", flow["reply"]
