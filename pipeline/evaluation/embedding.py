"""Embeddings of a folder of shards: one Parquet file per shard.

    <out>/train-000000.parquet      key, image_id, caption (its number; null for the image), vector
    <out>/_done/train-000000.json   written last: digests of the checkpoint and shard, size and row counts
    <out>/_source.json              the folder of shards

A shard whose record names the same checkpoint and content is skipped, so that an interrupted run resumes, and a bucket
that has grown costs only its new shards. Batches are cut inside a shard: vectors depend neither on the rank nor on
where a run was resumed. Ranks share the shards.

Shapes: n images and m captions of a batch of samples, D embedding dimensions.
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
from typing import TYPE_CHECKING

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
DONE = "_done"  # readers of Parquet folders ignore names with a leading underscore
_READERS = 16  # records read in parallel


@dataclass(frozen=True)
class EmbeddedShard:
    """The record of a finished shard: its inputs and contents."""

    checkpoint: str  # digest
    shard: str  # digest of its content
    bytes: int  # of the Parquet file
    images: int
    captions: int
    skipped: dict[str, int]  # unusable samples by reason


@dataclass(frozen=True)
class EmbeddingSummary:
    """Totals of a whole folder."""

    shards: int
    already_done: int  # of these, embedded by an earlier call
    images: int
    captions: int
    skipped: int  # samples


class Embedder:
    """A stage that was trained by contrast, with its tokenizer and config. `digest` identifies the weights."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, config: RunConfig, stage: StageConfig, digest: str):
        if "itc" not in stage.objectives:
            raise ConfigError(
                f"stage {stage.name} trained no contrast ({', '.join(stage.objectives)}), so that its images and texts "
                "have no common space; give the checkpoint of a stage with objective 'itc'"
            )
        self.model, self.tokenizer, self.digest = model, tokenizer, digest
        self.config, self.max_text_length = config.for_stage(stage), stage.max_text_length

    def batches(self, storage: Storage, source: Source, skipped: Counter[str]) -> Iterator[pyarrow.Table]:
        """Yield the rows of a source's samples by batch, and count unusable samples in `skipped` by reason."""
        samples = iter_samples(storage, source)
        size = self.config.evaluation.batch_size
        with ThreadPoolExecutor(self.config.data.loader.threads_per_worker, "images") as threads:
            while batch := list(itertools.islice(samples, size)):
                images = list(threads.map(self._image, batch))
                skipped.update(reason for reason in images if isinstance(reason, str))
                usable = [(s, i) for s, i in zip(batch, images, strict=True) if not isinstance(i, str)]
                if usable:
                    yield self._rows([sample for sample, _ in usable], [image for _, image in usable])

    def _image(self, sample: Sample) -> np.ndarray | str:
        """Return the resized image, or the reason why it cannot be decoded."""
        try:
            with judging("members"):
                check_members(sample.members, sample.is_duplicate)
                data = image_bytes(sample.members)
                return resize_for(decode(data, self.config.data.max_pixels), self.config.model)
        except BadSample as bad:
            return str(bad)

    def _rows(self, samples: Sequence[Sample], images: Sequence[np.ndarray]) -> pyarrow.Table:
        """Return the row of each image, followed by those of its captions."""
        size, pad = self.config.evaluation.batch_size, self.tokenizer.pad_id
        captions = [_captions(sample) for sample in samples]
        counts = [1 + len(texts) for texts in captions]
        encoded = self.tokenizer.encode_batch([text for texts in captions for text in texts], self.max_text_length)
        image_vectors = embed_images(self.model, torch.from_numpy(np.stack(images)), size)
        text_vectors = embed_texts(self.model, [t.ids for t in encoded], pad, size) if encoded else image_vectors[:0]
        per_image = text_vectors.split([count - 1 for count in counts])
        vectors = [torch.cat([image[None], texts]) for image, texts in zip(image_vectors, per_image, strict=True)]
        return _table(
            keys=[s.key for s, n in zip(samples, counts, strict=True) for _ in range(n)],
            ids=[s.image_id for s, n in zip(samples, counts, strict=True) for _ in range(n)],
            numbers=[number for n in counts for number in (None, *range(n - 1))],
            vectors=torch.cat(vectors),
        )


def embed_shards(
    embedder: Embedder, storage: Storage, url: str, out: str, ranks: Ranks = SINGLE_PROCESS, max_bad_rate: float = 0.01
) -> EmbeddingSummary:
    """Embed the shards that are not embedded yet. All ranks call this together and get the same result.

    Raises DataError for a folder without an index, a changed shard, or one with too many bad samples.
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
        already_done=len(done),
        images=sum(record.images for record in records),
        captions=sum(record.captions for record in records),
        skipped=sum(sum(record.skipped.values()) for record in records),
    )


def _claim(storage: Storage, out: str, url: str, manifest: Manifest) -> None:
    """Record in `out` the folder of shards that its files belong to.

    Raises ConfigError where they belong to another one, whose files of the same names would be lost. Folders are
    compared by the content of their shards: one that has moved, grown or been repaired in part is still the same.
    """
    shards = {shard.name: shard.digest for shard in manifest.shards}
    record_url = join(out, SOURCE)
    if storage.exists(record_url):
        data = storage.read(record_url)
        try:
            record = json.loads(data)
            known_url, known_shards = str(record["url"]), {str(k): str(v) for k, v in record["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{record_url} is damaged ({error}); name another folder with --out") from error
        if known_url != url and not shards.items() & known_shards.items():
            raise ConfigError(
                f"--out {out}: holds the vectors of {known_url}, and files of the same names would be lost; name "
                f"another folder for those of {url}"
            )
    elif parquet_files := [name for name in storage.list(out) if name.endswith(".parquet")]:
        expected = {parquet_name(name) for name in shards}
        if not _finished(storage, out, manifest.shards, None) and set(parquet_files) & expected:
            raise ConfigError(
                f"--out {out}: holds {parquet_files[0]}, made from other shards than those of {url}; name another"
            )
    storage.write(record_url, json.dumps({"url": url, "digest": manifest.digest, "shards": shards}, indent=1).encode())


def _embed_shard(
    embedder: Embedder, storage: Storage, url: str, shard: ShardRecord, out: str, max_bad_rate: float
) -> EmbeddedShard:
    """Embed a shard and write its file, then its record."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet files need pyarrow, which is not installed here: pip install pyarrow") from error

    # Embedding a text gives the width of the vectors.
    width = embed_texts(embedder.model, [embedder.tokenizer.encode("a", 8).ids], embedder.tokenizer.pad_id).shape[1]
    schema = _table([], [], [], torch.zeros(0, width)).schema
    schema = schema.with_metadata({b"mome.checkpoint": embedder.digest.encode()})
    skipped: Counter[str] = Counter()
    images = rows = 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.parquet"
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for table in embedder.batches(storage, Source(url, Manifest((shard,))), skipped):
                writer.write_table(table)
                images += table["caption"].null_count
                rows += len(table)
        check_skipped(shard.name, images, skipped, max_bad_rate)
        storage.upload(file, join(out, parquet_name(shard.name)))
        record = EmbeddedShard(embedder.digest, shard.digest, file.stat().st_size, images, rows - images, dict(skipped))
    storage.write(join(out, DONE, _record_name(shard.name)), json.dumps(asdict(record), indent=1).encode())
    return record


def _finished(
    storage: Storage, out: str, shards: Sequence[ShardRecord], digest: str | None
) -> dict[str, EmbeddedShard]:
    """Return the records, by shard name, of complete files made from this content and checkpoint.

    `digest` identifies the checkpoint; None: any.
    """
    files, known = storage.list_info(out), set(storage.list(join(out, DONE)))

    def read(shard: ShardRecord) -> EmbeddedShard | None:
        if _record_name(shard.name) not in known:
            return None
        try:
            record = EmbeddedShard(**json.loads(storage.read(join(out, DONE, _record_name(shard.name)))))
        except (ValueError, TypeError, RecursionError):  # a damaged record counts as missing
            return None
        file = files.get(parquet_name(shard.name))
        same = digest in (None, record.checkpoint) and record.shard == shard.digest
        return record if same and file is not None and file.size == record.bytes else None

    with ThreadPoolExecutor(_READERS, "records") as threads:
        records = dict(zip((shard.name for shard in shards), threads.map(read, shards), strict=True))
    return {name: record for name, record in records.items() if record is not None}


def checkpoint_digest(*facts: bytes) -> str:
    """Return the SHA-256 (hex) of a checkpoint's identifying bytes."""
    return hashlib.sha256(b"".join(facts)).hexdigest()


def parquet_name(shard: str) -> str:
    return f"{Path(shard).stem}.parquet"


def _record_name(shard: str) -> str:
    return f"{Path(shard).stem}.json"


def _captions(sample: Sample) -> list[str]:
    """Return the captions of a sample; none if it has none, and only its image is embedded."""
    try:
        with judging("members"):
            return list(captions_of(sample.members))
    except BadSample:
        return []


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
