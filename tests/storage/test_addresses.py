"""Addresses of storages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import StorageError
from mailerq.storage.addresses import S3, Directory, Postgres, address_problem, parse_address
from mailerq.storage.opening import make_backend


@pytest.mark.parametrize("scheme", ["dir", "directory", "DIRECTORY"])
def test_a_directory(scheme: str) -> None:
    assert parse_address(f"{scheme}:///var/lib/x%20y?depth=3&compression=gzip") == Directory(
        path="/var/lib/x y", depth=3, compress=True
    )
    assert parse_address(f"{scheme}:///srv/") == Directory(path="/srv")


def test_an_s3_bucket() -> None:
    found = parse_address(
        "s3://AK:a%2Fb%2Bc@eu-west-1/bucket/mail/er?endpoint=https://s3.test:9000&ca-file=/ca.pem"
    )
    assert found == S3(
        access_key="AK", secret="a/b+c", region="eu-west-1", bucket="bucket", prefix="mail/er",
        endpoint="https://s3.test:9000", ca_file="/ca.pem",
    )  # fmt: skip
    assert str(found) == "s3://eu-west-1/bucket"
    assert "a/b+c" not in repr(found)


def test_a_database() -> None:
    found = parse_address("postgresql://me:se%24ame@db.test:5433/mail?sslmode=require&table=m.b")
    assert isinstance(found, Postgres)
    assert found.uri == "postgresql://me:se%24ame@db.test:5433/mail?sslmode=require"
    assert (found.table, found.secrets) == ("m.b", ("se%2524ame", "se%24ame", "se$ame"))
    assert str(found) == "postgresql://db.test:5433/mail"
    assert "ame" not in repr(found)


def test_a_database_on_a_socket() -> None:
    found = parse_address("postgresql:///mail?host=/run/postgresql&compression=gzip")
    assert isinstance(found, Postgres)
    assert found.uri == "postgresql:///mail?host=/run/postgresql"
    assert found.compress
    assert str(found) == "postgresql:///run/postgresql/mail"


@pytest.mark.parametrize(
    "scheme", ["couchbase", "mongo", "mongodb", "mysql", "redis", "sqlite", "MySQL"]
)
def test_a_storage_of_others_is_refused_by_name(scheme: str) -> None:
    problem = address_problem(f"{scheme}://user:sesame@host/db")
    assert problem is not None
    assert problem.startswith(f"{scheme.lower()} is not supported; there are directory:///path")
    assert "sesame" not in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/var/lib/bodies", "is not an address"),
        ("ftp://host/x", "'ftp' is not known"),
        ("directory://var/lib", "three slashes"),
        ("directory:///", "three slashes"),
        ("directory:///x?depth=9", "depth is a number from 0 to 8"),
        ("directory:///x?depth=-1", "depth is a number"),
        ("directory:///x?deep=1", "'deep' is not known"),
        ("directory:///x?compression=zip", "gzip or none"),
        ("directory:///x?novalue", "is not a URI"),
        ("directory:///x#y", "%23"),
        ("directory:///x%00y", "NUL"),
        ("s3://region/bucket", "s3://key:secret@region/bucket"),
        ("s3://key:sesame@region/", "is not the name of a bucket"),
        ("s3://key:sesame@region/Bucket_1", "is not the name of a bucket"),
        ("s3://key:sesame@region/bucket/a/../b", "cannot begin"),
        ("s3://key:sesame@region/bucket?endpoint=s3.test", "https:// or http://"),
        ("s3://key:ses/ame@region/bucket", "is not a URI"),
        ("postgresql://u:sesame@h/db?table=a;drop", "plain name of a table"),
        ("postgresql://u:sesame@h:port/db", "is not a URI"),
    ],
)
def test_a_mistake_is_told_without_the_password(text: str, words: str) -> None:
    problem = address_problem(text)
    assert problem is not None
    assert words in problem
    assert "sesame" not in problem


@given(st.text(max_size=60))
def test_any_text_is_judged(text: str) -> None:
    for address in (text, f"s3://{text}", f"postgresql://{text}", f"directory://{text}"):
        address_problem(address)


def test_a_storage_that_cannot_be_used_is_told_before_anything_starts() -> None:
    with pytest.raises(StorageError, match="storage-address mysql is not supported"):
        make_backend(Config(storage_address="mysql://u:p@h/db"))


def test_a_plain_endpoint_elsewhere_is_refused() -> None:
    address = "s3://key:sesame@region/bucket?endpoint=http://s3.example.com"
    with pytest.raises(StorageError, match="http without TLS is for servers on this host"):
        make_backend(Config(storage_address=address))


def test_the_address_is_hidden_where_settings_are_shown() -> None:
    config = Config(storage_address="s3://key:sesame@region/bucket")
    assert "sesame" not in repr(config)
