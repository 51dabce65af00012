"""Embeddings of a folder of shards: one Parquet file per shard.

    <out>/train-000000.parquet      key, image_id, caption (its number; null for the image), vector
    <out>/_done/train-000000.json   written last: digests of the checkpoint and shard, size and row counts
    <out>/_source.json              the folder of shards

A shard whose record names the same checkpoint and content is skipped, so that an interrupted run resumes, and a bucket
that has grown costs only its new shards. Batches are cut inside a shard: vectors depend neither on the rank nor on
where a run was resumed. Ranks share the shards.
"""

import itertools
import json
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.contents.members import captions_of, check_members, image_bytes
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.shards.index import ShardRecord
from pipeline.data.shards.manifest import Manifest, load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage, join
from pipeline.evaluation.datasets import check_skipped
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, gathered
from pipeline.evaluation.retrieval import Predictor

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
class Embedder:
    """The model of a stage, on its own on each rank. `digest` identifies the weights."""

    predictor: Predictor
    config: RunConfig  # with the stage's image size (`for_stage`)
    stage: StageConfig
    digest: str

    def embed_shard(self, storage: Storage, source: Source, out: str) -> EmbeddedShard:
        """Embed a source of one shard, each image before its captions; write its file, then its record.

        Raises ConfigError where pyarrow is not installed, DataError for a changed or largely bad shard.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError("Parquet files need pyarrow, which is not installed here: pip install pyarrow") from error
        tokenizer, config = self.predictor.tokenizer, self.config
        width = self.predictor.embed_texts([tokenizer.encode("a", 8).ids]).shape[1]
        types = {"key": pa.string(), "image_id": pa.int64(), "caption": pa.int32()}
        vector, metadata = pa.list_(pa.float32(), width), {b"mome.checkpoint": self.digest.encode()}
        schema = pa.schema(types | {"vector": vector}, metadata=metadata)
        (shard,) = source.manifest.shards
        samples, skipped = iter_samples(storage, source), Counter[str]()
        num_images = num_captions = 0
        with (
            tempfile.TemporaryDirectory() as folder,
            ThreadPoolExecutor(config.data.loader.threads_per_worker, "images") as threads,
        ):
            file = Path(folder) / "rows.parquet"
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                while batch := list(itertools.islice(samples, config.evaluation.batch_size)):
                    decoded = list(threads.map(self._decode, batch))
                    skipped.update(reason for reason in decoded if isinstance(reason, str))
                    usable = [(s, *d) for s, d in zip(batch, decoded, strict=True) if not isinstance(d, str)]
                    if not usable:
                        continue
                    images = torch.from_numpy(np.stack([image for _, image, _ in usable]))
                    of_images = self.predictor.embed_images(images)
                    texts = [text for _, _, captions in usable for text in captions]
                    encoded = tokenizer.encode_batch(texts, self.stage.max_text_length)
                    of_texts = self.predictor.embed_texts([t.ids for t in encoded]) if texts else of_images[:0]
                    rows, vectors, text_vectors = [], [], iter(of_texts)
                    for (sample, _, captions), of_image in zip(usable, of_images, strict=True):
                        rows += [(sample.key, sample.image_id, n) for n in (None, *range(len(captions)))]
                        vectors += [of_image, *itertools.islice(text_vectors, len(captions))]
                    columns = [pa.array(c, t) for c, t in zip(zip(*rows, strict=True), types.values(), strict=True)]
                    flat = pa.array(torch.cat(vectors).numpy(), pa.float32())
                    columns.append(pa.FixedSizeListArray.from_arrays(flat, width))
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                    num_images += len(usable)
                    num_captions += len(texts)
            check_skipped(shard.name, num_images, skipped, config.data.max_bad_rate)
            storage.upload(file, join(out, _file_name(shard)))
            size = file.stat().st_size
        record = EmbeddedShard(self.digest, shard.digest, size, num_images, num_captions, dict(skipped))
        storage.write(join(out, DONE, _file_name(shard, "json")), json.dumps(asdict(record), indent=1).encode())
        return record

    def _decode(self, sample: Sample) -> tuple[np.ndarray, list[str]] | str:
        """Return the resized image with its captions, if any, or the reason why it cannot be decoded."""
        image: np.ndarray | None = None
        try:
            with judging("members"):
                check_members(sample.members, sample.is_duplicate)
                pixels = decode(image_bytes(sample.members), self.config.data.max_pixels)
                image = resize_for(pixels, self.config.model)
                return image, list(captions_of(sample.members))
        except BadSample as bad:  # without captions, only the image is embedded
            return str(bad) if image is None else (image, [])


def embed_shards(
    embedder: Embedder, storage: Storage, url: str, out: str, ranks: Ranks = SINGLE_PROCESS
) -> dict[str, int]:
    """Embed the shards that are not embedded yet. All ranks call this together and get the folder's totals.

    Raises ConfigError for a stage without contrast, DataError for a folder without an index; else as `embed_shard`.
    """
    if "itc" not in embedder.stage.objectives:
        raise ConfigError(
            f"stage {embedder.stage.name} trained no contrast ({', '.join(embedder.stage.objectives)}), so that its "
            "images and texts have no common space; give the checkpoint of a stage with objective 'itc'"
        )
    manifest = load_manifest(storage, url)
    with gathered(ranks) as claims:
        claims.append({} if ranks.rank else _claim(storage, out, url, manifest, embedder.digest))
    done: dict[str, EmbeddedShard] = claims[0]
    waiting = [shard for shard in manifest.shards if shard.name not in done][ranks.rank :: ranks.world_size]
    sources = [Source(url, Manifest((shard,))) for shard in waiting]
    with gathered(ranks) as records:
        records += [embedder.embed_shard(storage, source, out) for source in sources]
    records += done.values()
    return {
        "shards": len(manifest.shards),
        "already_done": len(done),
        "images": sum(record.images for record in records),
        "captions": sum(record.captions for record in records),
        "skipped": sum(sum(record.skipped.values()) for record in records),
    }


def _claim(storage: Storage, out: str, url: str, manifest: Manifest, digest: str) -> dict[str, EmbeddedShard]:
    """Record in `out` the folder of shards that its files belong to, and return the finished shards' records by name.

    These are of complete files made from this content and the checkpoint `digest`. Raises ConfigError where the files
    belong to another folder of shards, and those of the same names would be lost. Folders are compared by the content
    of their shards: one that has moved, grown or been repaired in part is still the same.
    """
    shards = {shard.name: shard.digest for shard in manifest.shards}
    record_url, files = join(out, SOURCE), storage.list_info(out)
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
    elif others := {_file_name(shard) for shard in manifest.shards} & files.keys():
        raise ConfigError(
            f"--out {out}: holds {min(others)}, and no {SOURCE} that says of which shards it is; name another folder"
        )
    storage.write(record_url, json.dumps({"url": url, "digest": manifest.digest, "shards": shards}, indent=1).encode())

    known, finished = set(storage.list(join(out, DONE))), {}
    recorded = [shard for shard in manifest.shards if _file_name(shard, "json") in known]
    urls = [join(out, DONE, _file_name(shard, "json")) for shard in recorded]
    with ThreadPoolExecutor(_READERS, "records") as threads:
        for shard, data in zip(recorded, threads.map(storage.read, urls), strict=True):
            try:
                embedded = EmbeddedShard(**json.loads(data))
            except (ValueError, TypeError, RecursionError):  # a damaged record counts as missing
                continue
            file = files.get(_file_name(shard))
            is_current = (embedded.checkpoint, embedded.shard) == (digest, shard.digest)
            if is_current and file is not None and file.size == embedded.bytes:
                finished[shard.name] = embedded
    return finished


def _file_name(shard: ShardRecord, suffix: str = "parquet") -> str:
    return f"{Path(shard.name).stem}.{suffix}"
