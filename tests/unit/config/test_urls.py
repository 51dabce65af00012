"""Malformed URLs are rejected with the correct form, by every config key, command and function."""

import os
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.urls import absolute, is_local, local_path, parse
from pipeline.data.storage import Storage

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"

REJECTED: dict[str, list[str]] = {  # expected part of the message -> URLs
    "'s3://bucket/x'": [
        "s3:/bucket/x", "s3:bucket/x", "S3://bucket/x", "S3:/bucket/x", "s3//bucket/x", "s3:\\\\bucket\\x", "s3:///bucket/x",
        "://bucket/x", "./s3://bucket/x", "/home/me/s3:/bucket/x", "./s3:/bucket/x", "s3 ://bucket/x", " s3://bucket/x",
        "s3://bucket/x\r", "s3://bucket/x\n",
    ],
    "names no bucket": ["s3://"], "s3://": ["s3:"], "'env:NAME'": ["s3://key:word-of-pass@bucket/x"],
    "'gs://bucket/x'": ["gs:/bucket/x", "GS://bucket/x"], "'gs://bucket'": ["gs:///bucket"],
    "'hf://org/name'": ["hf:org/name"], "'https://host/x'": ["https:/host/x"],
    "'unknown://host/x'": ["unknown:/host/x"],
    "'file:///abs/x'": ["file:/abs/x", "file:abs/x", "File:///abs/x", "file://abs/x", "file://localhost/abs/x"],
    "'file://abs/x'": ["FILE://abs/x"], "file:///": ["file://"],
    "${SCRATCH}": ["${SCRATCH}/runs"], "${oc.env:SCRATCH}": ["${oc.env:SCRATCH}/runs"], "$SCRATCH": ["$SCRATCH/runs"],
    "$BUCKET": ["s3://$BUCKET/runs"], "${USER}": ["s3://bucket/${USER}"], "$USER": ["runs/$USER"],
    "$(": ["$(pwd)/runs"],
    "%SCRATCH%": ["%SCRATCH%/runs"], "{{ bucket }}": ["s3://{{ bucket }}/runs"], "<bucket>": ["s3://<bucket>/runs"],
    "home folder of": ["~nobody-of-this-name/runs", "file://~nobody-of-this-name/runs"],
    "'~/runs'": ["/data/~/runs", "./~/runs"], "Windows": ["C:\\runs", "C:/runs"], "empty": ["", "  "],
    "control character": ["a\x00b", "a\x1b[2Jb"], "runs a program": ["pipe:cat x"],
}  # fmt: skip
WRONG = {url: expected for expected, urls in REJECTED.items() for url in urls}
LOCAL = [
    "/abs/x", "/", ".", "runs", "a:b", "/data/12:30:00/x", "a$b/c$", "{000..012}.tar", "100%/50%", "x~/~x", "./~x",
    "日本/é", "s3x", "s3/x", "https",
]  # fmt: skip
RIGHT = {
    "s3://bucket/x": ("s3", "bucket/x"), "s3://bucket": ("s3", "bucket"), "s3a://bucket/x/": ("s3", "bucket/x"),
    "s3://bucket/a:b/~/x y": ("s3", "bucket/a:b/~/x y"), "gs://bucket/x": ("gs", "gs://bucket/x"),
    "memory://x": ("memory", "memory://x"), "memory:///x": ("memory", "memory:///x"),
    "https://host/caf%C3%A9.tar?token=1": ("https", "https://host/caf%C3%A9.tar?token=1"),
    "file:///abs/x": ("file", "/abs/x"), "file://~/x": ("file", os.path.expanduser("~/x")),
    **{path: ("file", os.path.expanduser(path)) for path in ("~/x", "~")},
    **{path: ("file", path) for path in LOCAL},
}  # fmt: skip
KEYS = [
    "output", "tokenizer.vocabulary", "sources.scenes.shards", "sources.scenes.opt_out", "stages.vision.start_from",
    "stages.vision.answer_list", "data.cache.folder",
]  # fmt: skip


def test_malformed_urls_are_rejected_with_the_correct_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage()
    calls = (parse, is_local, local_path, absolute, storage.read, storage.exists, storage.list, storage.delete)
    calls += (lambda url: storage.write(url, b"x"), lambda url: storage.upload(__file__, url))
    for url, expected in WRONG.items():
        for call in calls:
            with pytest.raises(ConfigError) as raised:
                call(url)
            assert expected in str(raised.value), url
            assert "word-of-pass" not in str(raised.value)
            assert str(raised.value).isprintable()
    assert os.listdir(tmp_path) == []
    assert {url: parse(url) for url in RIGHT} == RIGHT


@pytest.mark.parametrize("url", ["s3:/bucket/x", "${SCRATCH}/runs"])
def test_every_config_key_rejects_a_malformed_url_by_name(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(DEMO, [f"{key}={url}" for key in KEYS])
    for key in KEYS:
        (line,) = [line for line in str(raised.value).splitlines() if line.startswith(f"{key}: ")]
        assert WRONG[url] in line
