"""``mailerq check-config``: everything that would keep a daemon from starting, and nothing else."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from tests.net.dns_server import open_dns_server
from tests.support import ROOT, compile_plugin, free_port, mailerq
from tests.test_cli_daemon import daemon, settings_in

OTHER_ACCOUNT = "nobody"

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its account")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that any account may reach and write to; pytest's are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def check(directory: Path, *more: str, status: int = 1, **options: Any) -> str:
    """What is wrong, or what is said when all is good."""
    given = {text.partition("=")[0] for text in more}
    usual = ["--dane=false", *settings_in(directory)]  # the resolver of this host is not ours
    settings = [text for text in usual if text.partition("=")[0] not in given]
    before = tree(directory)
    done = mailerq("check-config", *settings, *more, **options)
    assert done.returncode == status, (done.stdout + done.stderr).decode()
    assert tree(directory) == before, "it changes nothing"
    return (done.stderr if status else done.stdout).decode()


def tree(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_uid, status.st_mode)
    return found


def test_a_good_configuration_is_called_good(tmp_path: Path) -> None:
    assert check(tmp_path, status=0).splitlines() == [
        "note: plugin-directory is empty: no plugins are loaded",
        f"note: queue-directory {tmp_path}/queue is missing: the daemon will make it",
        "the configuration is good",
    ]


def test_every_mistake_of_every_layer_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "config.txt"
    file.write_text(
        "smtp-prot: 25\n"
        "smtp-threads: many\n"
        "smtp-range: 10.0.0.1/8\n"
        "no colon\n"
        "lock: /nowhere/pid\n"
        "lock: /elsewhere/pid\n"
        "smtp-username: ann\n"
        "rabbitmq-results: outbox\n"
        "www-port: 80\n"
        "dns-servers: 127.0.0.1:5353, ns.test\n"
    )
    said = check(
        tmp_path,
        *("--smtp-ip=127.0.0.1", "--user=no-such-user", "--smtp-maxsize=5X", "--wrong=1", "stray"),
        *(f"--send-log-file={tmp_path}/no/log", f"--lock={tmp_path}/pid"),
        f"--config-file={file}",
        "--smtp-connections",
        env={"MAILERQ_DNS_ATTEMPTS": "0", "MAILERQ_SMTP_ADDRESS": "x"},
    ).splitlines()
    expected = [
        ("--smtp-connections", "needs a value"),
        ("--wrong", "unknown setting 'wrong'"),
        ("stray", "is not a setting"),
        ("MAILERQ_SMTP_ADDRESS", "unknown setting 'smtp-address'"),
        (f"{file}:1", "did you mean smtp-port?"),
        (f"{file}:4", "not of the form 'key: value'"),
        (f"{file}:6", f"second value for lock; the first is at {file}:5"),
        (f"{file}:9", "www-port is not supported yet"),
        (f"{file}:2", "smtp-threads: 'many' is not a whole number"),
        (f"{file}:3", "smtp-range: '10.0.0.1/8' is not a network"),
        (f"{file}:10", "dns-servers: 'ns.test' is not an IP address"),
        ("MAILERQ_DNS_ATTEMPTS", "dns-attempts: 0 is less than 1"),
        ("--smtp-maxsize", "smtp-maxsize: '5X' is not a size"),
        (f"{file}:7", "smtp-username needs smtp-password"),
        (f"{file}:8", "rabbitmq-results is the outbox"),
        ("--user", "user: no-such-user: no such account"),
        ("--send-log-file", "send-log-file: cannot write"),
    ]
    for line, (where, problem) in zip(said, expected, strict=False):
        assert line.startswith(f"mailerq: {where}: "), said
        assert problem in line
    assert said[len(expected) :] == ["mailerq: 17 mistakes: a daemon would not start"]


def test_a_value_that_is_wrong_contradicts_nothing(tmp_path: Path) -> None:
    said = check(tmp_path, "--smtp-certifcate=a.pem", "--smtp-key=b.pem").splitlines()
    assert len(said) == 2
    assert "did you mean smtp-certificate?" in said[0]
    said = check(tmp_path, "--smtp-connections=0", "--smtp-connections-in=2000").splitlines()
    assert len(said) == 2


def test_what_another_layer_makes_good_is_checked_as_well(tmp_path: Path) -> None:
    file = tmp_path / "config.txt"
    file.write_text("send-log-file: a\x01b\n")
    said = check(tmp_path, f"--send-log-file={tmp_path}/no/log", f"--config-file={file}")
    assert f"{file}:1: send-log-file: holds a control character" in said
    assert f"--send-log-file: send-log-file: cannot write {tmp_path}/no/log: there is no" in said


def test_a_port_that_another_program_has_is_named(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as two,
    ):
        ports = sorted((one.getsockname()[1], two.getsockname()[1]))
        said = check(
            tmp_path,
            f"--smtp-port={ports[0]},{free_port()}",
            f"--lmtp-port={ports[1]}",
            "--smtp-ip=127.0.0.1;::1;192.0.2.1",
        )
    assert "smtp-port: cannot listen on " in said
    assert "lmtp-port: cannot listen on " in said
    assert "--smtp-ip: smtp-ip: cannot listen on 192.0.2.1:" in said
    assert said.count("Address already in use") == 2


def test_a_port_that_is_for_root_is_named(directory: Path) -> None:
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) < 2:
            pytest.skip("every port is for everybody here")
    code = (
        "import os, sys\n"
        "from mailerq.cli import checking, main\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    settings = [text for text in settings_in(directory) if "smtp-port" not in text]
    done = subprocess.run(
        [sys.executable, "-c", code, "check-config", *settings, "--smtp-port=1", "--dane=false"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert "127.0.0.1:1: Permission denied (ports below 1024 need root)" in done.stderr


def test_beside_the_daemon_of_these_settings_all_is_good(tmp_path: Path) -> None:
    log = f"--send-log-file={tmp_path}/send.log"
    with daemon(tmp_path, log) as running:
        with running.connect() as client:
            port = f"--smtp-port={running.port}"
            said = check(tmp_path, log, port, status=0)
            assert client.noop()[0] == 250, "the daemon goes on"
        assert said.endswith("the configuration is good\n")
        running.process.send_signal(15)
        assert running.wait() == 0


def test_beside_several_processes_all_is_good(tmp_path: Path) -> None:
    with daemon(tmp_path, "--smtp-processes=2") as running:
        port = f"--smtp-port={running.port}"
        assert "is good" in check(tmp_path, port, "--smtp-processes=2", status=0)


def test_beside_the_daemon_of_other_settings_what_it_has_is_a_mistake(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        pid = running.process.pid
        said = check(tmp_path, f"--smtp-port={running.port}", f"--queue-directory={tmp_path}/other")
    assert f"smtp-port: cannot listen on 127.0.0.1:{running.port}: Address already in use" in said
    assert f"--lock: lock: another mailerq is running (process {pid})" in said


def test_a_queue_that_a_daemon_holds_without_answering_is_named(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        (tmp_path / "queue" / "control").unlink()
        said = check(tmp_path, f"--lock={tmp_path}/other")
        assert f"queue.lock is held by another mailerq, process {running.process.pid}" in said


def test_a_lock_may_be_nothing_that_others_have_planted(tmp_path: Path) -> None:
    lock = tmp_path / "pid"
    lock.symlink_to(tmp_path / "precious")
    assert f"lock: cannot open {lock}: " in check(tmp_path)
    lock.unlink()
    os.mkfifo(lock)
    assert f"lock: cannot open {lock}: it is no file of this account alone" in check(tmp_path)
    lock.unlink()
    (tmp_path / "precious").touch()
    lock.hardlink_to(tmp_path / "precious")
    assert f"lock: cannot open {lock}: it is no file of this account alone" in check(tmp_path)


def test_a_lock_may_be_in_a_queue_directory_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert "queue is missing: the daemon will make it" in check(tmp_path, "--lock=", status=0)
    said = check(tmp_path, "--lock=", f"--queue-directory={tmp_path}/pid/queue", status=0)
    assert "queue is missing" in said
    (tmp_path / "pid").touch()
    said = check(tmp_path, "--lock=", f"--queue-directory={tmp_path}/pid/queue")
    assert "queue-directory:" in said
    assert "1 mistake:" in said


BREAKS = """
#include <mailerq.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
__attribute__((constructor)) static void load(void) { __builtin_trap(); }
"""


def test_plugins_are_opened_as_at_a_start(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    compile_plugin(plugins, "good.c", (ROOT / "plugins" / "null.c").read_text())
    here = f"--plugin-directory={plugins}"
    assert f"note: plugin-directory {plugins} has good.so\n" in check(tmp_path, here, status=0)
    compile_plugin(plugins, "breaks.c", BREAKS)
    assert "plugin-directory: " in check(tmp_path, here)
    (plugins / "breaks.so").write_text("no ELF")
    said = check(tmp_path, here, "--smtp-threads=0")
    assert f"--plugin-directory: plugin-directory: {plugins}/breaks.so: " in said
    assert "smtp-threads" in said


# Logs


def test_each_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    said = check(
        tmp_path,
        f"--send-log-file={tmp_path}/no/send",
        f"--received-log-file={tmp_path}/folder",
        f"--refused-log-file={tmp_path}/refused",
        f"--application-log=stderr,{tmp_path}/no/application,{tmp_path}/application",
    )
    assert f"send-log-file: cannot write {tmp_path}/no/send: there is no directory" in said
    assert f"received-log-file: cannot write {tmp_path}/folder: Is a directory" in said
    assert f"application-log: cannot write to {tmp_path}/no/application: there is no" in said
    assert said.endswith("mailerq: 3 mistakes: a daemon would not start\n")


# The account


@AS_ROOT
def test_files_are_checked_with_the_rights_of_the_account(directory: Path) -> None:
    (directory / "closed").mkdir(mode=0o755)
    (directory / "queue").mkdir(mode=0o755)
    log = directory / "send.log"
    log.touch(0o644)
    said = check(
        directory,
        f"--user={OTHER_ACCOUNT}",
        f"--send-log-file={log}",
        f"--received-log-file={directory}/closed/received.log",
    )
    assert f"queue-directory: {directory}/queue is not readable and writable for nobody" in said
    assert f"send-log-file: cannot write {log}: Permission denied" in said
    assert f"nobody may not write into {directory}/closed" in said
    assert "queue-directory" not in check(directory, f"--send-log-file={log}", status=0)


@AS_ROOT
def test_what_the_account_cannot_reach_is_named(directory: Path) -> None:
    closed = directory / "closed"
    (closed / "queue").mkdir(parents=True)
    closed.chmod(0o700)
    user = f"--user={OTHER_ACCOUNT}"
    for queue in (closed / "queue", closed / "new"):
        said = check(directory, user, f"--queue-directory={queue}")
        assert f"queue-directory: nobody cannot reach {queue}: Permission denied" in said
    said = check(directory, user, f"--send-log-file={closed}/logs/send.log")
    assert f"cannot write {closed}/logs/send.log: Permission denied" in said


def test_a_queue_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for queue, problem in (
        ("file", f"{tmp_path}/file is no directory"),
        ("file/queue", f"cannot reach {tmp_path}/file/queue: Not a directory"),
    ):
        assert problem in check(tmp_path, f"--queue-directory={tmp_path}/{queue}")
    check(tmp_path, f"--queue-directory={tmp_path}/one/of/several", status=0)


@AS_ROOT
def test_an_account_that_cannot_be_had_is_named(directory: Path) -> None:
    code = (
        "import os, sys\n"
        "from mailerq.cli import main\n"
        "def refuse(*_): raise PermissionError(1, 'Operation not permitted')\n"
        "os.initgroups = refuse\n"  # as in a container without that capability
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check-config", *settings_in(directory, "--user=nobody")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert "--user: user: cannot become nobody: Operation not permitted" in done.stderr


@AS_ROOT
def test_an_application_log_of_another_account_may_be_no_link(directory: Path) -> None:
    (directory / "log").symlink_to(directory / "precious")
    here = f"--application-log={directory}/log"
    assert "application-log: cannot write" in check(directory, f"--user={OTHER_ACCOUNT}", here)
    check(directory, here, status=0)


@AS_ROOT
def test_a_key_that_only_root_can_read_is_noted(directory: Path) -> None:
    chain, key = certificate(directory)
    key.chmod(0o600)
    said = check(
        directory,
        *(f"--user={OTHER_ACCOUNT}", f"--smtp-certificate={chain}", f"--smtp-key={key}"),
        status=0,
    )
    assert f"note: smtp-key {key} is read at the start only: nobody may not" in said


# Certificates


def certificate(directory: Path, name: str = "one", **options: Any) -> tuple[Path, Path]:
    issued = trustme.CA().issue_cert("mx.test", **options)
    chain, key = directory / f"{name}.pem", directory / f"{name}.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return chain, key


def test_a_certificate_with_its_key_is_good(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    check(tmp_path, f"--smtp-certificate={chain}", f"--smtp-key={key}", status=0)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + chain.read_bytes())
    check(tmp_path, f"--smtp-certificate={both}", status=0)


def test_what_is_wrong_with_a_certificate_is_said(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    _, other = certificate(tmp_path, "other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN NOTHING-----\n")
    locked = tmp_path / "locked.key"
    openssl = ["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:x", "-out", locked]
    subprocess.run(openssl, check=True, capture_output=True)
    for certificate_file, key_file, problem in (
        (chain, other, f"the key in {other} is that of another certificate"),
        (garbage, key, "it has no certificate in PEM"),
        (chain, chain, f"or {chain} has no key in PEM"),
        (chain, locked, f"the key in {locked} has a password"),
        (tmp_path / "no.pem", key, f"cannot use {tmp_path}/no.pem: No such file or directory"),
        (chain, tmp_path / "no.key", f"smtp-key: cannot use {tmp_path}/no.key: No such file"),
    ):
        said = check(tmp_path, f"--smtp-certificate={certificate_file}", f"--smtp-key={key_file}")
        assert problem in said, said


@pytest.mark.parametrize(
    ("days", "problem"), [(-1, "certificate has expired"), (2, "certificate is not yet valid")]
)
def test_a_certificate_counts_in_its_time_only(tmp_path: Path, days: int, problem: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    times = {"not_after": now + days * day, "not_before": now + (days - 1) * day}
    chain, key = certificate(tmp_path, **times)
    said = check(tmp_path, f"--smtp-certificate={chain}", f"--smtp-key={key}")
    assert f"smtp-certificate: cannot use {chain}: {problem}" in said


def test_ciphers_that_do_not_exist_are_named(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    files = (f"--smtp-certificate={chain}", f"--smtp-key={key}")
    assert "smtp-ciphers: NOTHING: " in check(tmp_path, *files, "--smtp-ciphers=NOTHING")


# Logins and addresses


def test_each_back_end_of_logins_is_tried(tmp_path: Path) -> None:
    said = check(
        tmp_path,
        f"--smtp-auth=carrier://coo;file://{tmp_path}/no;exec://{tmp_path};hardcoded://x",
        f"--smtp-local-addresses={tmp_path}/addresses",
        "--rabbitmq-local=local",
    )
    assert "smtp-auth: carrier:// is not supported" in said
    assert f"smtp-auth: {tmp_path}/no: No such file or directory" in said
    assert "smtp-auth: hardcoded:// takes login:password" in said
    assert f"smtp-local-addresses: cannot use {tmp_path}/addresses" in said


def test_what_a_start_would_warn_of_is_a_note(tmp_path: Path) -> None:
    logins = tmp_path / "logins"
    logins.write_text("ann:x\nno colon\n")
    said = check(tmp_path, f"--smtp-auth=file://{logins}", status=0)
    assert f"note: {logins}:2: no login:hash, skipped\n" in said


# For programs


def test_programs_get_all_of_it_in_one_object(tmp_path: Path) -> None:
    done = mailerq(
        "check-config", *settings_in(tmp_path, "--smtp-threads=0", "--dane=false"), "--json"
    )
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "ok": False,
        "problems": [
            {
                "where": "--smtp-threads",
                "text": "smtp-threads: 0 is less than 1",
                "key": "smtp-threads",
            }
        ],
        "notes": [
            "plugin-directory is empty: no plugins are loaded",
            f"queue-directory {tmp_path}/queue is missing: the daemon will make it",
        ],
    }


def test_patterns_for_replies_are_tried_on_their_samples(tmp_path: Path) -> None:
    limits, responses = ROOT / "contrib" / "providers.toml", tmp_path / "responses.toml"
    text = (ROOT / "contrib" / "responses.toml").read_text()
    responses.write_text(text)
    settings = (f"--limits-file={limits}", f"--responses-file={responses}")
    assert "the configuration is good" in check(tmp_path, *settings, status=0)
    line = text.splitlines().index("text = 'mail content denied'")
    responses.write_text(text.replace("mail content denied", "mail content refused"))
    found = check(tmp_path, *settings)
    assert f"{responses}:{line - 2}: samples: 'qq-content' does not match '550 Mail" in found
    responses.write_text(text)
    found = check(tmp_path, settings[1])
    assert f"{responses}:17: provider: no [[provider]] in limits-file is named 'google'" in found


def test_a_socket_that_is_not_there_yet_is_no_mistake(tmp_path: Path) -> None:
    settings = ("--smtp-local-domains=d.test", f"--local-delivery=lmtp://{tmp_path}/lmtp")
    note = f"note: local-delivery: there is no socket {tmp_path}/lmtp now; mail waits for it"
    assert note in check(tmp_path, *settings, status=0)
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(f"{tmp_path}/lmtp")
        assert "there is no socket" not in check(tmp_path, *settings, status=0)


async def dane_note(tmp_path: Path, *more: str) -> str:
    """What is said about DANE."""
    said = await trio.to_thread.run_sync(partial(check, tmp_path, "--dane=true", *more, status=0))
    (note,) = [line for line in said.splitlines() if "DANE" in line]
    return note


async def test_it_says_whether_dane_is_in_force(tmp_path: Path) -> None:
    zone: dict[tuple[str, str], Any] = {("", "NS"): ["a.root-servers.test."]}
    async with open_dns_server(zone) as server:
        ours = f"--dns-servers={server.address}"
        assert "the resolver does not validate" in await dane_note(tmp_path, ours)
        server.secure = lambda name, kind: True
        in_force = "note: DANE is in force: the resolver validates"
        assert await dane_note(tmp_path, ours) == in_force
        server.zone["_25._tcp", "TLSA"] = 2
        assert "mangles negative answers" in await dane_note(tmp_path, ours)
    note = await dane_note(tmp_path, "--dns-servers=192.0.2.53")
    assert note.startswith("note: DANE is off: the DNS server 192.0.2.53 is not on this host")
    assert "dns-trust-ad" in note
    assert "DANE" not in await trio.to_thread.run_sync(partial(check, tmp_path, status=0))


def test_a_validator_that_cannot_work_is_a_mistake(tmp_path: Path) -> None:
    said = check(tmp_path, "--dns-validator=unbound", f"--dns-trust-anchor={tmp_path}/none")
    assert f"dns-trust-anchor: cannot read {tmp_path}/none: No such file" in said
    said = check(tmp_path, "--dns-validator=none")
    assert "dns-validator: 'none' is none of resolver, unbound" in said
