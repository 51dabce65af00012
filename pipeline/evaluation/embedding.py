"""Embeddings of a folder of shards: one Parquet file per shard.

    <out>/train-000000.parquet      key, image_id, caption (its number; null for the image), vector
    <out>/_done/train-000000.json   written last: digests of the checkpoint and shard, size and row counts
    <out>/_source.json              the folder of shards

A shard whose record names the same checkpoint and content is skipped, so that an interrupted run resumes, and a bucket
that has grown costs only its new shards. Batches are cut inside a shard: vectors depend neither on the rank nor on
where a run was resumed. Ranks share the shards.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.contents.members import captions_of, check_members, image_bytes
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.shards.index import ShardRecord
from pipeline.data.shards.manifest import Manifest, load_manifest
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

    @cached_property
    def schema(self) -> pyarrow.Schema:
        """The columns of the files. Raises ConfigError where pyarrow is not installed."""
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ConfigError("Parquet files need pyarrow, which is not installed here: pip install pyarrow") from error
        # Embedding a text gives the width of the vectors.
        width = embed_texts(self.model, [self.tokenizer.encode("a", 8).ids], self.tokenizer.pad_id).shape[1]
        types = {"key": pa.string(), "image_id": pa.int64(), "caption": pa.int32()}
        vector = pa.list_(pa.float32(), width)
        return pa.schema(types | {"vector": vector}, metadata={b"mome.checkpoint": self.digest.encode()})

    def batches(self, storage: Storage, source: Source, skipped: Counter[str]) -> Iterator[pyarrow.Table]:
        """Yield a source's rows by batch, each image's followed by those of its captions.

        Unusable samples are counted in `skipped` by reason.
        """
        import pyarrow as pa

        samples = iter_samples(storage, source)
        size = self.config.evaluation.batch_size
        with ThreadPoolExecutor(self.config.data.loader.threads_per_worker, "images") as threads:
            while batch := list(itertools.islice(samples, size)):
                decoded = list(threads.map(self._decode, batch))
                skipped.update(reason for reason in decoded if isinstance(reason, str))
                usable = [(s, *parts) for s, parts in zip(batch, decoded, strict=True) if not isinstance(parts, str)]
                if not usable:
                    continue
                texts = [text for _, _, captions in usable for text in captions]
                token_ids = [tokens.ids for tokens in self.tokenizer.encode_batch(texts, self.max_text_length)]
                pixels = torch.from_numpy(np.stack([image for _, image, _ in usable]))
                of_images = embed_images(self.model, pixels, size)
                of_texts = of_images[:0]
                if token_ids:
                    of_texts = embed_texts(self.model, token_ids, self.tokenizer.pad_id, size)
                rows, order = [], []  # vectors are taken from those of the images, followed by those of the texts
                text_number = itertools.count(len(usable))
                for number, (sample, _, captions) in enumerate(usable):
                    rows += [(sample.key, sample.image_id, n) for n in (None, *range(len(captions)))]
                    order += [number, *itertools.islice(text_number, len(captions))]
                columns = [pa.array(c, t) for c, t in zip(zip(*rows, strict=True), self.schema.types, strict=False)]
                flat = pa.array(torch.cat([of_images, of_texts])[order].view(-1).numpy(), pa.float32())
                columns.append(pa.FixedSizeListArray.from_arrays(flat, of_images.shape[1]))
                yield pa.Table.from_arrays(columns, schema=self.schema)

    def _decode(self, sample: Sample) -> tuple[np.ndarray, list[str]] | str:
        """Return the resized image with its captions, if any, or the reason why it cannot be decoded."""
        try:
            with judging("members"):
                check_members(sample.members, sample.is_duplicate)
                data = image_bytes(sample.members)
                image = resize_for(decode(data, self.config.data.max_pixels), self.config.model)
        except BadSample as bad:
            return str(bad)
        try:
            with judging("members"):
                return image, list(captions_of(sample.members))
        except BadSample:  # only the image is embedded
            return image, []


def embed_shards(
    embedder: Embedder, storage: Storage, url: str, out: str, ranks: Ranks = SINGLE_PROCESS, max_bad_rate: float = 0.01
) -> EmbeddingSummary:
    """Embed the shards that are not embedded yet. All ranks call this together and get the same result.

    Raises ConfigError where `out` holds the files of other shards, DataError for a folder without an index, a changed
    shard, or one with too many bad samples.
    """
    manifest = load_manifest(storage, url)

    def find() -> dict[str, EmbeddedShard]:
        if ranks.rank != 0:
            return {}
        _claim(storage, out, url, manifest)
        return _finished(storage, out, manifest.shards, embedder.digest)

    done = run_on_all_ranks(ranks, find)[0]
    waiting = [shard for shard in manifest.shards if shard.name not in done][ranks.rank :: ranks.world_size]
    parts = run_on_all_ranks(
        ranks, lambda: [_embed_shard(embedder, storage, url, shard, out, max_bad_rate) for shard in waiting]
    )
    records = [*done.values(), *itertools.chain(*parts)]
    return EmbeddingSummary(
        shards=len(manifest.shards),
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
    elif others := {_file_name(name) for name in shards} & set(storage.list(out)):
        raise ConfigError(
            f"--out {out}: holds {min(others)}, and no {SOURCE} that says of which shards it is; name another folder"
        )
    storage.write(record_url, json.dumps({"url": url, "digest": manifest.digest, "shards": shards}, indent=1).encode())


def _embed_shard(
    embedder: Embedder, storage: Storage, url: str, shard: ShardRecord, out: str, max_bad_rate: float
) -> EmbeddedShard:
    """Embed a shard and write its file, then its record."""
    schema = embedder.schema
    import pyarrow.parquet

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
        storage.upload(file, join(out, _file_name(shard.name)))
        record = EmbeddedShard(embedder.digest, shard.digest, file.stat().st_size, images, rows - images, dict(skipped))
    storage.write(join(out, DONE, _file_name(shard.name, "json")), json.dumps(asdict(record), indent=1).encode())
    return record


def _finished(storage: Storage, out: str, shards: Sequence[ShardRecord], digest: str) -> dict[str, EmbeddedShard]:
    """Return the records, by shard name, of complete files made from this content and the checkpoint `digest`."""
    files, known = storage.list_info(out), set(storage.list(join(out, DONE)))
    names = {shard: _file_name(shard.name, "json") for shard in shards}
    urls = {shard: join(out, DONE, name) for shard, name in names.items() if name in known}
    finished = {}
    with ThreadPoolExecutor(_READERS, "records") as threads:
        for shard, data in zip(urls, threads.map(storage.read, urls.values()), strict=True):
            try:
                record = EmbeddedShard(**json.loads(data))
            except (ValueError, TypeError, RecursionError):  # a damaged record counts as missing
                continue
            file = files.get(_file_name(shard.name))
            same = (record.checkpoint, record.shard) == (digest, shard.digest)
            if same and file is not None and file.size == record.bytes:
                finished[shard.name] = record
    return finished


def _file_name(shard: str, suffix: str = "parquet") -> str:
    return f"{Path(shard).stem}.{suffix}"
