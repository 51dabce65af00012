"""Embeddings of a whole folder of shards: one Parquet file for each shard, readable by whatever reads Parquet.

    <out>/train-000000.parquet      key, image_id, caption (the caption's number; null for the picture), vector
    <out>/_done/train-000000.json   written last: the checkpoint and the shard it was made from, its size, its rows
    <out>/_source.json              the folder of shards that all of these are of

A shard whose record names the same checkpoint and content is not read again, so that whoever is killed goes on where it
stood, and a bucket that has grown costs only its new shards. Batches are cut inside a shard: vectors do not depend on
who embeds which, nor on where it was taken up again. Ranks share the shards.

Shapes: n pictures and m captions of a batch of samples, D width of the vectors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.contents.members import captions_of, check_members, image_bytes
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.shards.manifest import Manifest, ShardRecord, load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage, join
from pipeline.evaluation.datasets import check_skipped
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, run_on_all_ranks
from pipeline.evaluation.retrieval import embed_images, embed_texts

if TYPE_CHECKING:
    import pyarrow

SOURCE = "_source.json"
DONE = "_done"  # readers of Parquet folders pass over names that begin so
_READERS = 16  # records of finished shards read at once


@dataclass(frozen=True)
class EmbeddedShard:
    """What a finished shard's file was made from, and what it holds."""

    checkpoint: str  # digest
    shard: str  # digest of its content
    bytes: int  # of the Parquet file
    pictures: int
    captions: int
    skipped: dict[str, int]  # samples without a readable picture, by reason


@dataclass(frozen=True)
class EmbeddingSummary:
    """Of a whole folder."""

    shards: int
    found_done: int  # of these, by an earlier call
    pictures: int
    captions: int
    skipped: int  # samples


class Embedder:
    """A stage's model, which was trained by contrast, and how it reads. `digest` names the weights."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, config: RunConfig, stage: StageConfig, digest: str):
        if "itc" not in stage.objectives:
            raise ConfigError(
                f"stage {stage.name} trained no contrast ({', '.join(stage.objectives)}): its pictures and texts share "
                "no space; give the checkpoint of a stage with objective 'itc'"
            )
        self.model, self.tokenizer, self.digest = model, tokenizer, digest
        self.config, self.max_text_length = config.for_stage(stage), stage.max_text_length

    def batches(self, storage: Storage, source: Source, skipped: Counter[str]) -> Iterator[pyarrow.Table]:
        """The rows of a source's samples, batch by batch; counts in `skipped` those whose picture is bad, by reason."""
        samples = iter_samples(storage, source)
        size = self.config.evaluation.batch_size
        with ThreadPoolExecutor(self.config.data.loader.threads_per_worker, "pictures") as threads:
            while batch := list(itertools.islice(samples, size)):
                pictures = list(threads.map(self._picture, batch))
                skipped.update(picture for picture in pictures if isinstance(picture, str))
                good = [(s, p) for s, p in zip(batch, pictures, strict=True) if not isinstance(p, str)]
                if good:
                    yield self._rows([sample for sample, _ in good], [picture for _, picture in good])

    def _picture(self, sample: Sample) -> np.ndarray | str:
        """As the model reads it; or why it cannot."""
        try:
            with judging("members"):
                check_members(sample.members, sample.is_duplicate)
                data = image_bytes(sample.members)
                return resize_for(decode(data, self.config.data.max_pixels), self.config.model)
        except BadSample as bad:
            return str(bad)

    def _rows(self, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> pyarrow.Table:
        """A picture's row, then its captions'."""
        size, pad = self.config.evaluation.batch_size, self.tokenizer.pad_id
        images = embed_images(self.model, torch.from_numpy(np.stack(pictures)), size)
        captions = [_captions(sample) for sample in samples]
        rows = [
            each.ids for each in self.tokenizer.encode_batch([t for c in captions for t in c], self.max_text_length)
        ]
        texts = embed_texts(self.model, rows, pad, size) if rows else images[:0]
        ends = itertools.accumulate((len(each) for each in captions), initial=0)
        parts = [
            torch.cat([image[None], texts[first : first + len(own)]])
            for image, own, first in zip(images, captions, ends, strict=False)
        ]
        counts = [1 + len(each) for each in captions]
        return _table(
            keys=[s.key for s, n in zip(samples, counts, strict=True) for _ in range(n)],
            ids=[s.image_id for s, n in zip(samples, counts, strict=True) for _ in range(n)],
            numbers=[number for n in counts for number in (None, *range(n - 1))],
            vectors=torch.cat(parts),
        )


def embed_shards(
    embedder: Embedder, storage: Storage, url: str, out: str, ranks: Ranks = SINGLE_PROCESS, max_bad_rate: float = 0.01
) -> EmbeddingSummary:
    """Embeds what is not yet embedded of a folder of shards. All ranks call it together and get the same.

    Raises DataError for a folder that is not indexed, a changed shard, or one with too many bad samples.
    """
    manifest = load_manifest(storage, url)
    shards = manifest.shards

    def find() -> dict[str, EmbeddedShard]:
        if ranks.rank == 0:
            _claim(storage, out, url, manifest)
        return _finished(storage, out, shards, embedder.digest) if ranks.rank == 0 else {}

    done = run_on_all_ranks(ranks, find)[0]
    waiting = [shard for shard in shards if shard.name not in done][ranks.rank :: ranks.world_size]

    def embed() -> dict[str, EmbeddedShard]:
        return {shard.name: _embed_shard(embedder, storage, url, shard, out, max_bad_rate) for shard in waiting}

    records = [*done.values(), *(record for part in run_on_all_ranks(ranks, embed) for record in part.values())]
    return EmbeddingSummary(
        shards=len(shards),
        found_done=len(done),
        pictures=sum(record.pictures for record in records),
        captions=sum(record.captions for record in records),
        skipped=sum(sum(record.skipped.values()) for record in records),
    )


def _claim(storage: Storage, out: str, url: str, manifest: Manifest) -> None:
    """Note in `out` which folder of shards its files are of.

    Raises ConfigError where they are of another one, whose files of the same names would be lost. That is known by the
    content of its shards: a folder that has moved, grown or been mended in part is still the same.
    """
    own = {shard.name: shard.digest for shard in manifest.shards}
    place = join(out, SOURCE)
    if storage.exists(place):
        there = _known_source(storage.read(place), place)
        known: dict[str, str] = there["shards"]
        is_same = there["url"] == url or bool(own.items() & known.items())
        if not is_same:
            raise ConfigError(
                f"--out {out}: holds the vectors of {there['url']}, and files of the same names would be lost; name "
                f"another folder for those of {url}"
            )
    elif made := [name for name in storage.list(out) if name.endswith(".parquet")]:
        expected = {parquet_name(name) for name in own}
        if not _finished(storage, out, manifest.shards, None) and set(made) & expected:
            raise ConfigError(f"--out {out}: holds {made[0]}, made from other shards than those of {url}; name another")
    storage.write(place, json.dumps({"url": url, "digest": manifest.digest, "shards": own}, indent=1).encode())


def _known_source(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
        return {"url": str(found["url"]), "shards": {str(k): str(v) for k, v in found["shards"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} is damaged ({error}); name another folder with --out") from error


def _embed_shard(
    embedder: Embedder, storage: Storage, url: str, shard: ShardRecord, out: str, max_bad_rate: float
) -> EmbeddedShard:
    """The file first, then its record."""
    parquet = _parquet()
    skipped: Counter[str] = Counter()
    pictures = rows = 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.parquet"
        with parquet.ParquetWriter(file, _schema(embedder)) as writer:
            for table in embedder.batches(storage, Source(url, Manifest((shard,))), skipped):
                writer.write_table(table)
                pictures += table["caption"].null_count
                rows += len(table)
        check_skipped(shard.name, pictures, skipped, max_bad_rate)
        storage.upload(file, join(out, parquet_name(shard.name)))
        record = EmbeddedShard(
            embedder.digest, shard.digest, file.stat().st_size, pictures, rows - pictures, dict(skipped)
        )
    storage.write(join(out, DONE, _record_name(shard.name)), json.dumps(asdict(record), indent=1).encode())
    return record


def _finished(
    storage: Storage, out: str, shards: Sequence[ShardRecord], digest: str | None
) -> dict[str, EmbeddedShard]:
    """Records, by the shard's name, of files that lie there whole and were made from this checkpoint and content.

    `digest` names the checkpoint; None: any.
    """
    files, known = storage.list_info(out), set(storage.list(join(out, DONE)))

    def read(shard: ShardRecord) -> EmbeddedShard | None:
        if _record_name(shard.name) not in known:
            return None
        try:
            record = EmbeddedShard(**json.loads(storage.read(join(out, DONE, _record_name(shard.name)))))
        except (ValueError, TypeError, RecursionError):  # a damaged record is of no file
            return None
        file = files.get(parquet_name(shard.name))
        same = digest in (None, record.checkpoint) and record.shard == shard.digest
        return record if same and file is not None and file.size == record.bytes else None

    with ThreadPoolExecutor(_READERS, "records") as threads:
        found = dict(zip((shard.name for shard in shards), threads.map(read, shards), strict=True))
    return {name: record for name, record in found.items() if record is not None}


def checkpoint_digest(*facts: bytes) -> str:
    """SHA-256 (hex) of what names a checkpoint's content."""
    return hashlib.sha256(b"".join(facts)).hexdigest()


def parquet_name(shard: str) -> str:
    return f"{Path(shard).stem}.parquet"


def _record_name(shard: str) -> str:
    return f"{Path(shard).stem}.json"


def _captions(sample: Sample) -> list[str]:
    """Empty where a picture has none: then its own vector is all there is to it."""
    try:
        with judging("members"):
            return list(captions_of(sample.members))
    except BadSample:
        return []


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet files need pyarrow, which is not installed here: pip install pyarrow") from error
    return pyarrow.parquet


def _schema(embedder: Embedder) -> pyarrow.Schema:
    """The width of the vectors is found by embedding a text."""
    width = embed_texts(embedder.model, [embedder.tokenizer.encode("a", 8).ids], embedder.tokenizer.pad_id).shape[1]
    names = {b"mome.checkpoint": embedder.digest.encode()}
    return _table([], [], [], torch.zeros(0, width)).schema.with_metadata(names)


def _table(keys: list[str], ids: list[int], numbers: list[int | None], vectors: Tensor) -> pyarrow.Table:
    import pyarrow as pa

    flat = pa.array(vectors.contiguous().view(-1).numpy(), pa.float32())
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "image_id": pa.array(ids, pa.int64()),
            "caption": pa.array(numbers, pa.int32()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
