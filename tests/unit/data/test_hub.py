"""`hf://`: what is read from a hub on the loopback interface, and how refusals and outages of the hub end."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config.errors import StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import NotFound, ObjectChanged, Storage
from tests.support.http_server import give, serving
from tests.support.hub import Hub, hub

TOKEN = "hf_TheTokenOfThisTest"
URL = "hf://lab/data"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub({"lab/data": tmp_path / "data"}) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def test_reads_are_ranged_and_see_what_changes_on_the_hub(served: Hub) -> None:
    folder, storage, url = served.repositories["lab/data"] / "train", Storage(), f"{URL}/train/shard.tar"
    folder.mkdir()
    content = bytes(range(256)) * 40
    (folder / "shard.tar").write_bytes(content)
    (folder / "empty").touch()
    info = storage.info(url)
    assert info.size == len(content)
    assert storage.read(url, 100, 1000, info.etag) == content[100:1000]
    assert sum("/resolve/" in request for request in served.requests) == 1
    assert storage.read(url) == content == storage.open(url).read() == storage.read(f"{URL}@v1/train/shard.tar")
    assert storage.read(f"{URL}/train/empty") == b""
    assert storage.list(URL) == ["train"]
    assert storage.list(f"{URL}/train/") == ["empty", "shard.tar"]
    assert storage.list(url) == storage.list(f"{URL}/other") == []
    assert storage.exists(f"{URL}/train")
    assert not storage.exists(f"{URL}/train/shard")
    with pytest.raises(NotFound, match="does not exist"):
        storage.read(f"{URL}/other/file")
    with pytest.raises(StorageError, match="it is a folder"):
        storage.read(URL)
    with pytest.raises(StorageError, match="too short"):
        storage.read(url, 0, len(content) + 1)
    (folder / "shard.tar").write_bytes(content[::-1] * 2)
    with pytest.raises(ObjectChanged):
        storage.read(url, 0, 10, info.etag)
    assert storage.read(url) == content[::-1] * 2


REFUSALS: dict[str, tuple[str, tuple[int, str] | None, str]] = {
    "missing": ("hf://lab/no-such-model", None, r"no such repository, or it is private \(404\).*spelling.*HF_TOKEN"),
    "anonymous": ("hf://lab/private", (401, "RepoNotFound"), r"or it is private \(401\).*HF_TOKEN"),
    "gated": ("hf://lab/gated", (403, "GatedRepo"), r"\(403, gated\).*Accept its terms.*HF_TOKEN"),
    "wrong token": ("hf://lab/secret", (401, ""), r"did not accept the credentials \(401\).*HF_TOKEN"),
    "forbidden": ("hf://lab/closed", (403, ""), r"denied the access \(403\).*HF_TOKEN"),
    "revision": (f"{URL}@v9", None, "not this revision.*branch, tag or commit"),
    "no owner": ("hf://bert-base-uncased", None, "the owner is needed, as in hf://google-bert/bert-base-uncased"),
    "invalid name": ("hf://lab/tiny..bert", None, "as hf://owner/name, hf://owner/name@revision"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_end_at_once_with_url_cause_and_remedy(served: Hub, case: str) -> None:
    url, refusal, message = REFUSALS[case]
    if refusal:
        served.refused[url.removeprefix("hf://")] = refusal
    check_refused(url, message)


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:1", "cannot be reached.*ConnectError.*HF_ENDPOINT.*hf download.*Gave up"),
        ("127.0.0.1:1", "cannot be reached.*UnsupportedProtocol.*HF_ENDPOINT"),
        ("outage", "answered with status 503.*HF_ENDPOINT"),
        ("website", "is not a hub.*HF_ENDPOINT"),
    ],
)
def test_hub_that_never_answered_is_given_up_after_seconds(
    served: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str
) -> None:
    monkeypatch.setattr("pipeline.data.storage.hub._FIRST_SECONDS", 0.5)
    served.outages = 10**6
    with serving(give("<html>Sign in</html>")) as website:
        if endpoint != "outage":
            monkeypatch.setenv("HF_ENDPOINT", {"website": website.url}.get(endpoint, endpoint))
        check_refused(URL, message)


def test_outage_after_the_first_answer_is_retried_for_the_configured_time(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.storage.hub._FIRST_SECONDS", 0.0)
    (served.repositories["lab/data"] / "file").write_bytes(b"content")
    storage = Storage(StorageConfig(retry_timeout_seconds=30))
    assert storage.read(f"{URL}/file") == b"content"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    served.outages = 10  # requests: huggingface_hub gives up after six
    assert storage.read(f"{URL}/file") == b"content"
    assert served.outages == 0


def check_refused(url: str, message: str) -> None:
    """Assert that an import fails soon as a wrong command does, and shows no token and writes no output."""
    started = time.monotonic()
    result = CliRunner().invoke(app, ["import", url, "--format", "bert", "--out", "out"])
    assert time.monotonic() - started < 5
    assert isinstance(result.exception, StorageError)
    text = str(result.exception)
    assert result.exception.exit_status == 2
    assert text.startswith(url)
    assert re.search(message, text), text
    assert TOKEN not in text + result.output
    assert not Path("out").exists()
