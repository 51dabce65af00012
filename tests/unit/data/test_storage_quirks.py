"""Stores that deviate from AWS (support/quirky_store.py): every operation works, or a StorageError says why not."""

import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import NoSpace, NotFound, Storage, s3
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.quirky_store import MANNERS, QUIRKS, REFUSALS, QuirkyStore, babbler

DATA = random.Random(0).randbytes(100_000)
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
FOLDER = "s3://bucket/folder"
OBJECT, NEW = f"{FOLDER}/a.tar", f"{FOLDER}/new"
ALERT = b"\x15\x03\x03\x00\x02\x02\x46"  # of TLS
SECRET_WORDS = (KEY, SECRET, "AWS4-HMAC", "Signature=", "Credential=", "otocore/")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def storage_at(endpoint: str, **settings: Any) -> Storage:
    return Storage(StorageConfig(endpoint_url=endpoint, **settings))


_client = cache(s3.make_client)  # creating one takes 0.2 s


@pytest.fixture(scope="module")
def shared_store() -> Iterator[QuirkyStore]:
    with QuirkyStore() as store:
        yield store


@pytest.fixture
def quirky(shared_store: QuirkyStore, clock, monkeypatch) -> Callable[[str], tuple[QuirkyStore, Storage]]:
    """Return quirky(name), which resets the store to that quirk with four objects, and returns it with a Storage."""
    for name, value in {"PART_BYTES": 40_000, "_MAX_EMPTY_PAGES": 20, "make_client": _client}.items():
        monkeypatch.setattr(s3, name, value)  # DATA takes three parts

    def make(quirk: str) -> tuple[QuirkyStore, Storage]:
        shared_store.reset(quirk)
        names = ("folder/a.tar", "folder/b.tar", "folder/in/c.tar", "folder2/d.tar")
        shared_store.objects = {("bucket", name): DATA for name in names}
        return shared_store, storage_at(shared_store.endpoint, anonymous=quirk == "unsigned_only")

    return make


def part(start: int, stop: int) -> bytes:
    return DATA[start:stop]


SIZES = [("a.tar", len(DATA)), ("b.tar", len(DATA))]
# name -> (what is done, its result in a store without quirks, changed contents of the folder afterwards)
OPERATIONS: dict[str, tuple[Callable[[Storage, Path], object], object, dict[str, bytes | None]]] = {
    "read": (lambda s, _: s.read(OBJECT), DATA, {}),
    "read_range": (lambda s, _: s.read(OBJECT, 10, 99_990), DATA[10:99_990], {}),
    "read_known": (lambda s, _: s.read(OBJECT, 1, 9, s.info(OBJECT).etag), DATA[1:9], {}),
    "open": (lambda s, _: s.open(OBJECT).read(), DATA, {}),
    "info": (lambda s, _: s.info(OBJECT).size, len(DATA), {}),
    "exists": (lambda s, _: s.exists(OBJECT), True, {}),
    "exists_folder": (lambda s, _: s.exists(FOLDER), True, {}),
    "list": (lambda s, _: s.list(FOLDER), ["a.tar", "b.tar", "in"], {}),
    "list_info": (lambda s, _: [(name, info.size) for name, info in s.list_info(FOLDER).items()], SIZES, {}),
    "write": (lambda s, _: s.write(NEW, b"new"), True, {"new": b"new"}),
    "write_parts": (lambda s, _: s.write_parts(NEW, len(DATA), part), True, {"new": DATA}),
    "upload": (lambda s, path: (path / "f").write_bytes(b"new") and s.upload(path / "f", NEW), None, {"new": b"new"}),
    "create": (lambda s, _: s.write(NEW, b"new", create=True), True, {"new": b"new"}),
    "create_parts": (lambda s, _: s.write_parts(NEW, len(DATA), part, create=True), True, {"new": DATA}),
    "create_present": (lambda s, _: s.write(OBJECT, b"new", create=True), False, {"a.tar": DATA}),
    "delete": (lambda s, _: s.delete(FOLDER), None, {"a.tar": None, "b.tar": None, "in/c.tar": None}),
    "delete_one": (lambda s, _: s.delete(OBJECT), None, {"a.tar": None}),
    "delete_absent": (lambda s, _: s.delete(NEW), None, {}),
    "abort_uploads": (lambda s, _: s.abort_uploads(FOLDER), 0, {}),
}
WRITES = {"write", "write_parts", "upload", "create", "create_parts", "create_present"}
LISTS = {"list", "list_info", "delete", "delete_one", "delete_absent"}
NO_SPACE = ("quota_403", "quota_413", "quota_507", "full")
BY_KIND = {"any": {*OPERATIONS}, "condition": set(), "write": WRITES, "listing": LISTS | {"exists_folder"}}
CONCERNS = {quirk: BY_KIND[concerned] for quirk, (_, concerned, _) in REFUSALS.items()} | {"endless_listing": LISTS}
# Operations that may fail because they need what the quirk removes.
MAY_FAIL = {("no_etag", "write_parts"), ("no_etag", "create_parts")}
REMEDIES = dict.fromkeys(NO_SPACE, r"^(?!.*credentials).*no space left.*Free some") | {
    "redirect_301": r"redirect \(301\) to https://store\.example.* storage\.endpoint_url",
    "redirect_nowhere": r"redirect \(301\) to nowhere",
    "clock_skew": r"clock",
    "expired": r"credentials have expired",
    "denied": r"access was denied.*credentials and permissions",
    "not_implemented": r"NotImplemented",
    "proxy_login": r"407",
}


def check_message(error: str) -> None:
    """Assert that a message names the URL, and is short, plain and without secrets."""
    assert error.startswith("s3://bucket/")
    assert not [word for word in SECRET_WORDS if word in error], error
    assert len(error) < 700
    assert error.isprintable()


# A store that refuses every request refuses them all alike: one operation of each kind shows it.
DISTINCT = ("read", "info", "exists_folder", "list", "write_parts", "create", "delete", "abort_uploads")


CASES = [(q, name) for q in QUIRKS for name in (DISTINCT if CONCERNS.get(q) == OPERATIONS.keys() else OPERATIONS)]


@pytest.mark.parametrize(("quirk", "operation"), CASES)
def test_operation_works_or_raises_a_storage_error_with_the_remedy(quirky, tmp_path, clock, quirk: str, operation: str):
    store, storage = quirky(quirk)
    do, expected, contents = OPERATIONS[operation]
    fails, error = QUIRKS[quirk] != "works" and operation in CONCERNS.get(quirk, set()), None
    try:
        assert do(storage, tmp_path) == expected
        for name, data in contents.items():
            assert store.objects.get(("bucket", f"folder/{name}")) == data
    except StorageError as raised:
        error = raised
    assert (error is not None) == fails or (quirk, operation) in MAY_FAIL, error
    if error is not None:
        check_message(str(error))
        assert isinstance(error, NoSpace) == (quirk in NO_SPACE)
        if quirk in NO_SPACE or operation in ("read", "list", "write_parts", "delete"):
            assert re.search(REMEDIES.get(quirk, ""), str(error))
    assert ("bucket", "folder2/d.tar") in store.objects
    is_retried = QUIRKS[quirk] == "passes" and fails
    assert clock.now == (pytest.approx(300.0) if is_retried else 0.0)
    assert not is_retried or len(store.requests) > 30


def test_folder_that_a_console_created_exists_but_no_other_empty_one(quirky):
    store, storage = quirky("no_prefix")
    store.objects["bucket", "marked/"] = b""
    assert [storage.exists(f"s3://bucket/{name}") for name in ("marked", "marked/", "mark", "in")] == [
        True,
        True,
        False,
        False,
    ]


def test_responses_with_odd_headers_are_explained(quirky):
    store, storage = quirky("denied")
    store.clock = 3600.0
    with pytest.raises(StorageError, match=r"Set this machine's clock"):
        storage.info(OBJECT)
    store, storage = quirky("none")
    store.edit = lambda answer: re.sub(rb"bytes 0-9/\d+", b"bytes 0-" + b"9" * 5000 + b"/" + b"9" * 5000, answer)
    with pytest.raises(StorageError, match="no stated range"):
        storage.read(OBJECT, 0, 10)
    store.edit = lambda _: b"HTTP/1.1 301 x\r\nContent-Length: 0\r\nx-amz-bucket-region: eu-west-1\r\n\r\n"
    for call, url in ((storage.info, OBJECT), (storage.list, FOLDER), (storage.read, OBJECT)):
        with pytest.raises(StorageError, match=r"redirect \(301\) to nowhere"):
            call(url)


def test_port_of_another_protocol_fails_without_retry(shared_store, clock):
    greetings = {"http": (b"SSH-2.0\r\n", ALERT), "https": (ALERT, b"-ERR unknown\r\n")}
    for scheme, greeting in [(name, first) for name, firsts in greetings.items() for first in firsts]:
        with babbler(greeting) as (address, clients):
            with pytest.raises(StorageError, match=rf"{scheme}://{address}.*scheme.*port"):
                storage_at(f"{scheme}://{address}").read(OBJECT)
            assert len(clients) == 1
    with pytest.raises(StorageError, match=r"SSLError.*http:// if the store does not speak TLS"):
        storage_at(shared_store.endpoint.replace("http:", "https:")).read(OBJECT)
    assert clock.now == 0.0


def test_variables_and_keys_are_never_shown(monkeypatch, shared_store, clock):
    values = {"ACCESS_KEY_ID": "two\nlines", "SECRET_ACCESS_KEY": "a\x1b[2Jb", "DEFAULT_REGION": "us-east-1\r"}
    for name, value in values.items():
        with monkeypatch.context() as patched:
            patched.setenv(f"AWS_{name}", value)
            with pytest.raises(ConfigError, match=rf"AWS_{name} has a line break") as rejected:
                storage_at("http://127.0.0.1:1").read(OBJECT)
            assert value not in str(rejected.value)
    shared_store.reset("echo")
    for value in ("schlüssel-€", "with space", "ключ"):
        monkeypatch.setenv("ODD", value)
        with pytest.raises(StorageError) as raised:
            storage_at(shared_store.endpoint, key="env:ODD", secret="env:ODD").read(OBJECT)
        assert value not in str(raised.value)
        check_message(str(raised.value))
    assert clock.now == 0.0
    vague, stated = ("http://host:99999", "http://[::1", "http://host:x"), ("localhost:9000", "minio", "http://a b", "")
    for endpoint in (*vague, *stated, "not-a-url", "ftp://host", "http://"):
        expected = "" if endpoint in vague else r"expected http://host:port, got "
        with pytest.raises(ConfigError, match=rf"storage: .*{expected}.*storage\.endpoint_url"):
            storage_at(endpoint).read(OBJECT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://name:word-of-pass@host")
    with pytest.raises(ConfigError, match=r"storage: .*user name") as raised:
        Storage().read(OBJECT)
    assert "word-of-pass" not in str(raised.value)


def test_anonymous_access_sends_unsigned_requests(quirky, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(s3, "make_client", _client.__wrapped__)
    store, anonymous = quirky("unsigned_only")
    with pytest.raises(StorageError, match=r"no credentials.*for a public bucket, storage\.anonymous: true"):
        storage_at(store.endpoint).read(OBJECT)
    assert anonymous.read(OBJECT) == DATA
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert storage_at(store.endpoint).read(OBJECT) == DATA
    assert not any("authorization" in request.headers for request in store.requests)
    with pytest.raises(ValueError, match=r"anonymous.*remove storage\.key"):
        StorageConfig(anonymous=True, key="env:X", secret="env:Y")


@pytest.mark.parametrize("ours", [True, False])
def test_lost_completion_is_verified_by_content(quirky, ours: bool):
    """R17: the response to a completion is lost, and the upload no longer exists when it is repeated."""
    store, storage = quirky("none")

    def lose_answer(answer: bytes) -> bytes:
        if "uploadId" not in store.requests[-1].query or store.requests[-1].method != "POST":
            return answer
        store.edit = None
        if not ours:
            store.objects["bucket", "folder/new"] = bytes(len(DATA))
        return b""

    store.edit = lose_answer
    with nullcontext() if ours else pytest.raises(StorageError, match=r"the upload was removed before it was complete"):
        storage.write_parts(NEW, len(DATA), part)
    assert (store.edit, store.objects["bucket", "folder/new"] == DATA) == (None, ours)


def test_damaged_responses_raise_storage_errors_only(quirky, tmp_path: Path):
    rng = random.Random(0)
    for number in range(fuzz_rounds(400)):
        store, storage = quirky(rng.choice(MANNERS))
        chosen, name = rng.random(), rng.choice(list(OPERATIONS))
        store.edit = lambda answer, chosen=chosen: mutate(answer, rng) if rng.random() < chosen else answer
        try:
            OPERATIONS[name][0](storage, tmp_path)
        except StorageError as error:
            check_message(str(error))
        except Exception as error:
            raise AssertionError(f"{name}, round {number}") from error


def test_http_urls_are_read_and_refused_operations_not_retried(quirky, clock):
    store, _ = quirky("none")
    web = f"{store.endpoint}/bucket/folder/a.tar"
    assert Storage().read(web) == DATA
    assert Storage().read(web, 5, 50) == DATA[5:50]
    with pytest.raises(NotFound):
        Storage().read(f"{web}.absent")
    with pytest.raises(StorageError, match="do not offer that"):
        Storage().delete(web)
    faults = {web.replace("http:", "https:"): "http:// if the store does not speak TLS"}
    faults |= {"http://127.0.0.1:99999/x": ".", "http:///x": "."}
    faults |= {f"{name}://host/x": f"{name}:// cannot be reached" for name in ("hdfs", "qq", "gs")}
    for url, message in faults.items():
        with pytest.raises((StorageError, ConfigError), match=message):
            Storage().read(url)
    store.quirk = "denied"
    with pytest.raises(StorageError, match="403"):
        Storage().read(web)
    assert clock.now == 0.0
