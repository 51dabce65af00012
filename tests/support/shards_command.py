"""Files to import, what importers made of them, `mome shards` in this process, and a tiny random detector."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner, Result

from jobs.shards import app
from pipeline.data.building.importers import find_kind, read_source
from pipeline.data.building.inputs import Import, ImportOptions, Problems, Sample

FEATURES = 16  # width of the detector's region features
TABLES = {  # of two images, the first with two captions
    "captions.txt": 'image,caption\na.jpg,"A dog, running ."\na.jpg,A cat .\nb.jpg,Third .\n',  # Kaggle's Flickr8k
    "unquoted.csv": "image,caption\na.jpg,A dog, running .\na.jpg,A cat .\nb.jpg,Third .\n",
    "Flickr8k.token.txt": "a.jpg#0\tA dog, running .\na.jpg#1\tA cat .\nb.jpg#0\tThird .\n",
    "results_20130124.token": "a.jpg#0\tA dog, running .\na.jpg#1\tA cat .\nb.jpg#0\tThird .\n",
    "results.csv": "image_name| comment_number| comment\n"
    "a.jpg| 0| A dog, running .\na.jpg| 1| A cat .\nb.jpg| 0| Third .\n",
    "open_clip.tsv": 'filepath\ttitle\na.jpg\tA dog, running .\na.jpg\t"A cat ."\nb.jpg\tThird .\n',
    "cc3m.tsv": "A dog, running .\ta.jpg\nA cat .\ta.jpg\nThird .\tb.jpg\n",
    "more.csv": 'id,Text ,Path\n1,"A dog,\nrunning .",a.jpg\n2,A cat .,a.jpg\n\n3,Third .,b.jpg\n',
    "semicolon.csv": "file;caption\na.jpg;A dog, running .\na.jpg;A cat .\nb.jpg;Third .\n",
    "quoted_semicolon.csv": 'caption;file\n"A dog,\nrunning .";a.jpg\n"A cat .";a.jpg\nThird .;b.jpg\n',
    "no_header.csv": 'a.jpg,"A dog, running ."\na.jpg,A cat .\nb.jpg,Third .\n',
    "bom.csv": '\ufeffimage,caption\r\na.jpg,"A dog, running ."\r\na.jpg,A cat .\r\nb.jpg,Third .\r\n',
}


def save_image(path: Path, shade: int = 0, kind: str | None = None) -> bytes:
    """Write a small grey image and return its bytes; the format follows the suffix (default: JPEG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade,) * 3).save(path, kind or {".png": "PNG"}.get(path.suffix, "JPEG"))
    return path.read_bytes()


def write_lines(path: Path, *records: object) -> Path:
    """Write one record per line: a text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def read(source: Path, problems: Problems | None = None, kind: Any = None, **options: Any) -> Import:
    """Read a source with its detected kind; without `problems`, its first fault is raised."""
    return read_source(source, kind or find_kind(source), problems or Problems(strict=True), ImportOptions(**options))


def record_of(sample: Sample) -> dict[str, Any]:
    """Return a sample's json; an empty object without one."""
    return json.loads(sample.get("json", b"{}"))


def captions_in(samples: Iterable[Sample]) -> list[list[str]]:
    return [record_of(sample).get("captions", []) for sample in samples]


def members_of(sample: Sample) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if name != "__key__"}


def run_shards(*arguments: object, fails: type[Exception] | None = None, status: int = 0) -> Result:
    """Run a command and check its exit status, or the type of the error that it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails), result.output + repr(result.exception)
    else:
        assert result.exit_code == status, result.output + repr(result.exception)
    return result


def refuses(kind: type[Exception], reason: str, *arguments: object) -> None:
    """Run a command that must raise an error whose message has a match of `reason`."""
    message = str(run_shards(*arguments, fails=kind).exception)
    assert re.search(reason, message), message


def facts_of(*arguments: object, status: int = 0) -> dict[str, Any]:
    """Return the JSON object that a command prints with --json."""
    return json.loads(run_shards(*arguments, "--json", status=status).stdout.splitlines()[-1])


def save_yolos(folder: Path) -> Path:
    """Save a detector of twelve queries."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=FEATURES, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=12, num_labels=5,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)
    return folder
