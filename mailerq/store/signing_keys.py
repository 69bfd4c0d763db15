"""Read private keys that sign mail, and keep those of files until the files change.

A key of RSA has 1024 to 4096 bits: verifiers refuse shorter ones (RFC 8301), and need not know
longer ones. The other kind is Ed25519 (RFC 8463).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, Final, NamedTuple

from mailerq.address import parse_domain
from mailerq.errors import AddressError
from mailerq.mail.dkim import Algorithm
from mailerq.rules.signing import Line, SigningFile, no_key_in_force, parse_selector, sources

__all__ = [
    "ENDING",
    "KeyFiles",
    "KeyProblem",
    "SigningKey",
    "Surveyed",
    "has_directory",
    "has_key",
    "keyless",
    "keys_in_force",
    "read_key",
    "selectors_in",
    "survey",
    "verifies",
]

log = logging.getLogger("mailerq.delivery")

MIN_BITS: Final = 1024
ADVISED_BITS: Final = 2048
MAX_BITS: Final = 4096

FILE_BYTES: Final = 1 << 16
"""Bytes of a key file."""

MAX_FILES: Final = 10_000
"""Keys of files that are kept."""

MAX_SELECTORS: Final = 16
"""Keys of one domain's directory that sign."""

ENDING: Final = ".pem"

PROBE: Final = b"mailerq"
"""Signed once with each key, because a key that was altered can be read, and signs wrongly."""


class KeyProblem(Exception):
    """A key cannot be used; the text says why, without the key's name."""


class SigningKey:
    """A private key. `sign` may be called in any thread, and releases Python's lock."""

    __slots__ = ("algorithm", "bits", "is_quick", "public", "sign", "size")

    algorithm: Algorithm

    bits: int

    size: int
    """Bytes of a signature."""

    public: str
    """The public key, as ``p=`` of its DNS record."""

    is_quick: bool
    """A signature takes some 30 µs, not hundreds."""

    sign: Callable[[bytes], bytes]
    """Return the signature of a text."""

    def __init__(self, pem: bytes) -> None:
        """Read a key in PEM. Raises `KeyProblem`."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

        key = _load(pem)
        if isinstance(key, RSAPrivateKey):
            self._be_rsa(key)
        elif isinstance(key, Ed25519PrivateKey):
            self._be_ed25519(key)
        else:
            kind = type(key).__name__.strip("_").removesuffix("PrivateKey")
            raise KeyProblem(f"is a key of {kind}, not of RSA or Ed25519")

    def _be_rsa(self, key: Any) -> None:
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self.bits = key.key_size
        if not MIN_BITS <= self.bits <= MAX_BITS:
            text = f"has {self.bits} bits; RSA keys have {MIN_BITS} to {MAX_BITS}, best 2048"
            raise KeyProblem(text)
        padding, hash = PKCS1v15(), SHA256()
        self.algorithm, self.is_quick = "rsa-sha256", False
        self.size = (self.bits + 7) // 8
        self.sign = lambda data: key.sign(data, padding, hash)
        public = key.public_key()
        try:
            public.verify(self.sign(PROBE), PROBE, padding, hash)
        except Exception:
            raise KeyProblem("is damaged: its parts do not belong together") from None
        encoded = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.public = base64.b64encode(encoded).decode()

    def _be_ed25519(self, key: Any) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self.algorithm, self.is_quick = "ed25519-sha256", True
        self.bits, self.size = 256, 64
        # RFC 8463, section 3: the SHA-256 of the text is what is signed.
        self.sign = lambda data: key.sign(hashlib.sha256(data).digest())
        self.public = base64.b64encode(
            key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        ).decode()

    @property
    def record(self) -> str:
        """The text of the DNS record (RFC 6376, section 3.6.1)."""
        kind = "rsa" if self.algorithm == "rsa-sha256" else "ed25519"
        return f"v=DKIM1; k={kind}; p={self.public}"


def _load(pem: bytes) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        # A full check of an RSA key takes 40 ms; `_be_rsa` makes a signature and checks that.
        return load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
    except TypeError:
        raise KeyProblem("is encrypted; keys that sign mail have no password") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if b"PUBLIC KEY-----" in pem and b"PRIVATE KEY-----" not in pem:
            raise KeyProblem("is a public key; a private key is needed") from None
        if b"-----BEGIN " not in pem:
            raise KeyProblem("is not a key in PEM") from None
        text = " ".join(str(error).split())[:100]
        raise KeyProblem(f"cannot be read: {text}") from None


def verifies(kind: str, key: str, signature: bytes, data: bytes) -> bool:
    """Whether a signature of SHA-256 holds with the key of a DNS record, its ``k=`` and ``p=``."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        raw = base64.b64decode(key)
        if kind == "ed25519":
            digest = hashlib.sha256(data).digest()
            Ed25519PublicKey.from_public_bytes(raw).verify(signature, digest)
            return True
        public = load_der_public_key(raw)
        if not isinstance(public, RSAPublicKey) or not MIN_BITS <= public.key_size <= MAX_BITS:
            return False
        public.verify(signature, data, PKCS1v15(), SHA256())
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def read_key(path: str) -> tuple[SigningKey, os.stat_result]:
    """Read the key in a file. Raises `KeyProblem` and OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise KeyProblem("is no file")
        data = os.read(file, FILE_BYTES + 1)
    finally:
        os.close(file)
    if len(data) > FILE_BYTES:
        raise KeyProblem(f"is larger than {FILE_BYTES} bytes")
    return SigningKey(data), status


def selectors_in(directory: str, domain: str) -> Sequence[str]:
    """List the selectors of a domain in `dkim-directory`, as the files spell them. Raises OSError.

    Files whose name is no selector are left out. A domain may have no directory, but `directory`
    itself must exist.
    """
    try:
        names = os.listdir(os.path.join(directory, domain))
    except (FileNotFoundError, NotADirectoryError):
        os.stat(directory)
        return ()
    found = sorted(name.removesuffix(ENDING) for name in names if name.endswith(ENDING))
    return [name for name in found if _is_selector(name)][:MAX_SELECTORS]


def has_directory(directory: str, domain: str) -> bool:
    """Whether a domain has a directory in `dkim-directory`, or a link to a missing one."""
    folder = os.path.join(directory, domain)
    return bool(directory and domain) and (os.path.isdir(folder) or os.path.islink(folder))


def _is_selector(name: str) -> bool:
    try:
        parse_selector(name)
    except AddressError:
        return False
    return True


class Surveyed(NamedTuple):
    """A key that the settings name: the key, or what is wrong with its file; and what is odd."""

    domain: str
    selector: str
    path: str
    key: SigningKey | None
    problem: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """The name of the key's DNS record."""
        return f"{self.selector}._domainkey.{self.domain}"


def survey(directory: str, file: SigningFile) -> Iterator[Surveyed]:
    """Read all keys that a `dkim-file` and `dkim-directory` name. Raises OSError for the latter."""
    seen: set[tuple[str, str, str]] = set()
    for domain, selector, path in _named(directory, file):
        if (domain, selector, path) in seen:
            continue
        seen.add((domain, selector, path))
        try:
            if not _is_selector(selector):
                raise KeyProblem(f"is not named for a selector: SELECTOR{ENDING}")
            key, status = read_key(path)
        except OSError as error:
            text = f"cannot be read: {error.strerror or error}"
            yield Surveyed(domain, selector, path, None, text)
        except KeyProblem as error:
            yield Surveyed(domain, selector, path, None, str(error))
        else:
            yield Surveyed(domain, selector.lower(), path, key, "", _note(key, status))


def has_key(directory: str, file: SigningFile, domain: str, now: float) -> bool:
    """Whether a key signs mail from a domain at a time. Keys are not read. Raises OSError."""
    found = sources(file, domain, directory, lambda owner: selectors_in(directory, owner))
    return any(source.options.signs(now) for source in found)


def keyless(directory: str, file: SigningFile, now: float) -> Iterator[tuple[str, str]]:
    """Find the domains that have a place for keys, but no key in force, and say what is wrong.

    A domain is one of a directory or of the `from` of a line, with its ``*``. Keys are not read.
    Raises OSError.
    """
    examples = {str(pattern): pattern.example for line in file.lines for pattern in line.patterns}
    folders = sorted(os.listdir(directory)) if directory else []
    examples |= {name: name for name in folders if _is_domain(name)}
    for name, domain in examples.items():
        found = sources(file, domain, directory, lambda owner: selectors_in(directory, owner))
        if any(source.options.signs(now) for source in found):
            continue
        has = has_directory(directory, domain)
        text = no_key_in_force(file, domain, directory, found, has_directory=has)
        if text:
            yield name, text


def keys_in_force(directory: str, file: SigningFile, now: float) -> Iterator[tuple[str, str, str]]:
    """Find the keys that sign mail or make ARC seals at a time: domain, selector and file of each.

    Keys are not read. Raises OSError.
    """
    lines: dict[tuple[str, str], list[Line]] = {}
    for line in file.lines:
        lines.setdefault((line.domain, line.selector), []).append(line)
    seen: set[tuple[str, str, str]] = set()
    for domain, name, path in _named(directory, file):
        selector = name.lower()
        if (domain, selector, path) in seen or not _is_selector(name):
            continue
        seen.add((domain, selector, path))
        folder = os.path.join(directory, domain, "")
        is_ours = bool(directory) and path.startswith(folder)
        options = []
        for line in (*lines.get((domain, selector), ()), *lines.get((domain, ""), ())):
            if line.path == path or (is_ours and not line.path):
                options.append(line)
        if any(line.options.is_in_force(now) for line in options) or (
            is_ours and not any(line.signs_for(domain) for line in options)
        ):
            yield domain, selector, path


def _is_domain(name: str) -> bool:
    try:
        return parse_domain(name) == name
    except AddressError:
        return False


def _named(directory: str, file: SigningFile) -> Iterator[tuple[str, str, str]]:
    for line in file.lines:
        if line.path:
            yield line.domain, line.selector, line.path
        elif line.selector:
            path = os.path.join(directory, line.domain, line.selector + ENDING)
            yield line.domain, line.selector, path
    if not directory:
        return
    for domain in sorted(os.listdir(directory)):
        folder = os.path.join(directory, domain)
        if os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if name.endswith(ENDING):
                    yield domain, name.removesuffix(ENDING), os.path.join(folder, name)


def _note(key: SigningKey, status: os.stat_result) -> str:
    if is_open(status):
        return "can be read or written by every account of this host"
    if key.algorithm == "rsa-sha256" and key.bits < ADVISED_BITS:
        return f"has {key.bits} bits; {ADVISED_BITS} are advised"
    return ""


def is_open(status: os.stat_result) -> bool:
    """Whether every account of this host may read or write a file."""
    return bool(status.st_mode & (stat.S_IROTH | stat.S_IWOTH))


class KeyFiles:
    """Keys of files, each read again when its file has changed. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._keys: dict[str, tuple[tuple[int, int, int], SigningKey]] = {}

    def get(self, path: str) -> SigningKey:
        """Return the key in a file. Raises `KeyProblem`, also if the file cannot be read."""
        try:
            seen = _seen(os.stat(path))
            with self._lock:
                known = self._keys.get(path)
            if known is not None and known[0] == seen:
                return known[1]
            key, status = read_key(path)
        except OSError as error:
            with self._lock:
                self._keys.pop(path, None)
            raise KeyProblem(f"cannot be read: {error.strerror or error}") from None
        if is_open(status):
            log.warning("%s can be read or written by every account of this host", path)
        with self._lock:
            self._keys.pop(path, None)
            if len(self._keys) >= MAX_FILES:
                del self._keys[next(iter(self._keys))]
            self._keys[path] = (_seen(status), key)
        return key


def _seen(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_ino, status.st_size
