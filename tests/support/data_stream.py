"""The data of runs without their models: configs, loaders and batches. As a program it is a process that can be killed,
which reads global batches and records them, one a line: the step, the hash of the examples, epoch:uid of each example.

python tests/support/data_stream.py CONFIG.json VOCABULARY WORLD_SIZE FIRST LAST RECORD
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory
from pipeline.data.loading.loader import Loader, fingerprint
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join
from pipeline.objectives import batch_groups

Values = dict[str, Any]
VLMO = {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4}


def data_config(
    sources: dict[str, str], objectives: Iterable[str] | Values = ("itc", "mlm", "mim"), source_type: str = "pairs",
    model: Values | None = None, data: Values | None = None, stage: Values | None = None, **changes: Any,
) -> RunConfig:  # fmt: skip
    """Return a run of one stage of batches of 10, which reads `sources` (name -> folder) with weights 1.0 and 1.7."""
    usual = {
        "name": "stage", "sources": dict(zip(sources, (1.0, 1.7), strict=False)), "steps": 100, "global_batch_size": 10,
        "objectives": objectives if isinstance(objectives, dict) else {name: {} for name in objectives},
        "max_text_length": 12,
    }  # fmt: skip
    values = {
        "name": "test", "seed": 3, "model": model or VLMO, "stages": [usual | (stage or {})],
        "sources": {name: {"shards": folder, "type": source_type} for name, folder in sources.items()},
        "data": {"streams": 5, "shuffle_window": 2, "max_bad_rate": 1.0} | (data or {}),
    }  # fmt: skip
    return validate(values | changes, "test")


def with_loader(config: RunConfig, **changes: int) -> RunConfig:
    """Return the config with other values of `data.loader`."""
    loader = config.data.loader.model_copy(update=changes)
    return config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})


@functools.cache
def caption_tokenizer() -> Tokenizer:
    """Return a tokenizer that knows the captions of `pairs.pair`."""
    return Tokenizer.train([f"picture {n} shows a thing in way {way}" for n in range(60) for way in "abc"], 200)


def open_loader(
    config: RunConfig, tokenizer: Tokenizer | None = None, rank: int = 0, world_size: int = 1,
    backend: BackendFactory | None = None,
) -> closing[Loader]:  # fmt: skip
    """Return a loader of the first stage, to use in `with`."""
    stage, storage, tokenizer = config.stages[0], Storage(config.storage), tokenizer or caption_tokenizer()
    loader = Loader(config, stage, batch_groups(config, stage), storage, tokenizer, rank, world_size, backend)
    return closing(loader)


def take(config: RunConfig, count: int = 1, start: int = 0, **loader: Any) -> list[Batch]:
    """Return a rank's batches of some steps; `loader` holds further arguments of `open_loader`."""
    with open_loader(config, **loader) as opened:
        return list(islice(opened.batches(start), count))


def hash_of(config: RunConfig, steps: range, world_size: int = 1, **settings: int) -> str:
    """Return the fingerprint of the first stage's batches, read with some values of `data.loader`."""
    config, stage = with_loader(config, **settings), config.stages[0]
    groups = batch_groups(config, stage)
    return fingerprint(config, stage, groups, Storage(config.storage), caption_tokenizer(), steps, world_size)


def copy_shards(folder: str, s3: Any, name: str = "pairs") -> str:
    """Index a folder of shards, copy it to a store (fixture `s3`), and return its URL there."""
    index_shards(Storage(), folder)
    storage, url = Storage(s3.config), s3.url(name)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: storage.upload(file, join(url, file.name)), sorted(Path(folder).iterdir())))
    return url


def stream_config(shards: str, storage: StorageConfig | None = None, **loading: dict[str, object]) -> RunConfig:
    """Return a config of pairs in 10 streams and batches of 20, which 3, 6 and 8 ranks divide unevenly."""
    stage = {"name": "pairs", "steps": 100_000, "global_batch_size": 20}
    data, store = {"streams": 10, "max_bad_rate": 0.01, **loading}, (storage or StorageConfig()).model_dump()
    return data_config({"pairs": shards}, data=data, stage=stage, name="stream", seed=5, storage=store)


def record(config: RunConfig, tokenizer: Tokenizer, world_size: int, steps: range, path: Path) -> None:
    """Append one line for each delivered step."""
    with ExitStack() as stack, path.open("a", encoding="utf-8") as file:
        loaders = [stack.enter_context(open_loader(config, tokenizer, rank, world_size)) for rank in range(world_size)]
        streams = [loader.batches(steps.start) for loader in loaders]
        for step in steps:
            digest, uids = hashlib.sha256(), []
            for stream in streams:
                batch = next(stream)
                batch.hash_into(digest)
                uids += batch.uid.tolist()
            epochs = [sample.epoch for sample in loaders[0].order.samples(step)]
            read = " ".join(f"{epoch}:{uid}" for epoch, uid in zip(epochs, uids, strict=True))
            file.write(f"{step} {digest.hexdigest()} {read}\n")
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """Return the whole lines and cut off a torn last one, as a checkpoint without COMMIT is ignored."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return whole.splitlines()


if __name__ == "__main__":
    file, vocabulary, world, first, last, path = sys.argv[1:]
    config = RunConfig.model_validate_json(Path(file).read_text(encoding="utf-8"))
    record(config, Tokenizer.load(Storage(), vocabulary), int(world), range(int(first), int(last)), Path(path))
