"""The data of a run without its model, as a process that can be killed: it reads and records global batches.

    python tests/support/data_stream.py CONFIG.json VOCABULARY WORLD_SIZE FIRST LAST RECORD

Each line of RECORD is one delivered global batch: its step, the hash of its examples, and epoch:uid of each example.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups


def stream_config(shards: str, storage: StorageConfig | None = None, **loading: dict[str, object]) -> RunConfig:
    """Return a config of pairs in 10 streams and batches of 20, which 3, 6 and 8 ranks divide unevenly."""
    stage = {
        "name": "pairs",
        "sources": {"pairs": 1.0},
        "steps": 100_000,
        "global_batch_size": 20,
        "max_text_length": 12,
    }
    values = {
        "name": "stream",
        "seed": 5,
        "storage": (storage or StorageConfig()).model_dump(),
        "model": {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4},
        "sources": {"pairs": {"shards": shards}},
        "data": {"streams": 10, "shuffle_window": 2, **loading},
        "stages": [stage | {"objectives": {"itc": {}, "mlm": {}, "mim": {}}}],
    }
    return validate(values, "stream")


def record(config: RunConfig, tokenizer: Tokenizer, world_size: int, steps: range, path: Path) -> None:
    """Append one line for each delivered step."""
    storage, stage = Storage(config.storage), config.stages[0]
    loaders = [
        Loader(config, stage, batch_groups(config, stage), storage, tokenizer, rank, world_size)
        for rank in range(world_size)
    ]
    streams = [loader.batches(steps.start) for loader in loaders]
    try:
        with path.open("a", encoding="utf-8") as file:
            for step in steps:
                digest, uids = hashlib.sha256(), []
                for stream in streams:
                    batch = next(stream)
                    batch.hash_into(digest)
                    uids += batch.uid.tolist()
                epochs = [slot.epoch for slot in loaders[0].order.batch(step)]
                read = " ".join(f"{epoch}:{uid}" for epoch, uid in zip(epochs, uids, strict=True))
                file.write(f"{step} {digest.hexdigest()} {read}\n")
                file.flush()
                os.fsync(file.fileno())
    finally:
        for loader in loaders:
            loader.close()


def whole_lines(path: Path) -> list[str]:
    """Return the whole lines and cut off a torn last one, as a checkpoint without COMMIT is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return whole.splitlines()


def main() -> None:
    config, vocabulary, world_size, first, last, path = sys.argv[1:]
    run = RunConfig.model_validate_json(Path(config).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(Storage(), vocabulary)
    record(run, tokenizer, int(world_size), range(int(first), int(last)), Path(path))


if __name__ == "__main__":
    main()
