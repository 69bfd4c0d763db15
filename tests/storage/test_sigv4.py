"""Signatures of S3, by the examples that AWS has published, and beside those of botocore."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.storage.sigv4 import EMPTY_DIGEST, canonical_query, digest, encode_path, sign

NOW = 1369353600.0  # 2013-05-24 00:00:00
ACCESS = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
HOST = "examplebucket.s3.amazonaws.com"


def signed(
    method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes = b""
) -> dict[str, str]:
    return sign(
        method, path, query, {"Host": HOST, **headers}, digest(body),
        access_key=ACCESS, secret=SECRET, region="us-east-1", now=NOW,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "body", "signature"),
    [
        ("GET", "/test.txt", {}, {"Range": "bytes=0-9"}, b"",
         "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("PUT", "/test$file.text", {},
         {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
         b"Welcome to Amazon S3.",
         "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
        ("GET", "/", {"lifecycle": ""}, {}, b"",
         "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("GET", "/", {"max-keys": "2", "prefix": "J"}, {}, b"",
         "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)  # fmt: skip
def test_the_published_examples(
    method: str,
    path: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    signature: str,
) -> None:
    added = signed(method, path, query, headers, body)
    assert added["Authorization"].endswith(f"Signature={signature}")
    assert added["X-Amz-Date"] == "20130524T000000Z"
    names = ";".join(
        sorted({"host", "x-amz-content-sha256", "x-amz-date", *map(str.lower, headers)})
    )
    assert f"SignedHeaders={names}, " in added["Authorization"]
    assert f"Credential={ACCESS}/20130524/us-east-1/s3/aws4_request, " in added["Authorization"]


def test_the_digest_of_nothing() -> None:
    assert EMPTY_DIGEST == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=30)
NAMES = st.from_regex(r"\A[a-z][a-z0-9-]{0,10}\Z")
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)


@given(
    st.sampled_from(["GET", "PUT", "DELETE", "POST"]),
    st.lists(TEXT.filter(bool), min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
    st.dictionaries(NAMES, TEXT, max_size=3),
    st.dictionaries(NAMES.map(lambda name: f"x-amz-meta-{name}"), VALUES, max_size=2),
    st.binary(max_size=50),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40),
)
def test_any_request_has_the_signature_of_botocore(
    method: str,
    path: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    secret: str,
) -> None:
    auth = pytest.importorskip("botocore.auth")
    awsrequest = pytest.importorskip("botocore.awsrequest")
    credentials = pytest.importorskip("botocore.credentials").Credentials(ACCESS, secret)

    class Then(auth.S3SigV4Auth):  # type: ignore[misc, name-defined]
        """Signs at the time of the test."""

        def add_auth(self, request: object) -> None:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(NOW))
            request.context["timestamp"] = stamp  # type: ignore[attr-defined]
            self._modify_request_before_signing(request)
            canonical = self.canonical_request(request)
            to_sign = self.string_to_sign(request, canonical)
            self._inject_signature_to_request(request, self.signature(to_sign, request))

    added = sign(
        method, path, query, {"Host": HOST, **headers}, digest(body),
        access_key=ACCESS, secret=secret, region="eu-central-1", now=NOW,
    )  # fmt: skip
    url = f"https://{HOST}{encode_path(path)}"
    if query:
        url += f"?{canonical_query(query)}"
    request = awsrequest.AWSRequest(method=method, url=url, headers=dict(headers), data=body)
    request.headers["X-Amz-Date"] = added["X-Amz-Date"]
    request.headers["X-Amz-Content-SHA256"] = digest(body)
    Then(credentials, "s3", "eu-central-1").add_auth(request)
    assert added["Authorization"] == request.headers["Authorization"]
