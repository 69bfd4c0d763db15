"""crypt(3), for the logins of `net/auth.py`."""

import pytest

from mailerq import _core


@pytest.mark.parametrize("method", [b"$6$salt", b"$5$salt", b"$y$j9T$salt", b"$2b$04$" + b"a" * 22])
def test_hash_is_its_own_setting(method: bytes) -> None:
    hashed = _core.crypt(b"secret", method)
    assert hashed is not None and hashed.startswith(method[:3])
    assert _core.crypt(b"secret", hashed) == hashed
    assert _core.crypt(b"other", hashed) != hashed


@pytest.mark.parametrize("setting", [b"", b"*", b"*0", b"!", b"$none$x", b"$6$salt:"])
def test_what_is_no_setting_has_no_hash(setting: bytes) -> None:
    assert _core.crypt(b"secret", setting) is None
