"""`mome bench loader`: CPU time per sample of our loader and others', in fresh processes, after a warm-up."""

import io
import itertools
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import gcd
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from jobs.bench import PEERS
from pipeline.config.errors import ConfigError, DataError, RunFailed
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data.building import importers
from pipeline.data.building.inputs import Problems, Sample
from pipeline.data.contents.images import draw_crop
from pipeline.data.contents.members import image_bytes
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples import augment
from pipeline.data.loading.loader import Loader
from pipeline.data.randomness import CounterRandom
from pipeline.data.reading.samples import iter_captions, iter_samples
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.objectives import batch_groups

PACKAGES = ("webdataset", "pillow", "torch", "simplejpeg", "opencv-python-headless", "tokenizers")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1") | {
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
DECODE = "simplejpeg"  # the contender that only decodes JPEGs
SEED = 0
MIN_SHARDS, MAX_SAMPLES_PER_SHARD = 16, 1000
IGNORED = -100  # label of a token that is not masked
IMAGES = ("jpg", "png", "jpeg", "webp")

WIDTH, HEIGHT, QUALITY = 640, 480, 90
SLOPE = 1.4  # amplitudes fall as frequency^-1.4, slightly less than in photos: sensor noise and sharp edges
CONTRAST = 52.0  # standard deviation of the pixels; gives JPEGs of about 90 kB, like photos of this size
WORDS = (  # noqa: SIM905
    "a the man woman dog child street red small large ball running standing beside behind water green field with two "
    "people white shirt playing holding looking camera mountain old building wooden bench sunny"
).split()

Measurement = dict[str, Any]
Batches = Iterator[tuple[Any, Any]]


@dataclass(frozen=True)
class BenchJob:
    """One measurement. Ours uses `workers` processes of `threads` threads; peers use workers x threads processes."""

    contender: str  # mome, simplejpeg, or one of PEERS
    shards: str  # local folder with a manifest
    vocabulary: str
    samples: int
    batch_size: int
    workers: int
    threads: int
    num_ops: int  # of RandAugment; 0 disables it

    def config(self) -> RunConfig:
        """Return the work as a run: one vision-language stage over the shards."""
        stage = {"name": "bench", "sources": {"photos": 1.0}, "objectives": {"itc": {}, "mlm": {}}, "steps": 10**9}
        loader = {"num_workers": self.workers, "threads_per_worker": self.threads}
        data = {"streams": gcd(self.batch_size, 16), "augment": {"num_ops": self.num_ops}, "loader": loader}
        values = {"name": "bench", "seed": SEED, "model": {"kind": "vlmo"}, "data": data}
        values["sources"] = {"photos": {"shards": self.shards}}
        values["stages"] = [stage | {"global_batch_size": self.batch_size}]
        return validate(values, "bench")


def bench_loader(
    shards: str | None, photos: tuple[Path, ...], job: BenchJob, rounds: int, peers: tuple[str, ...],
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure all loaders on `shards`, `photos` or synthetic images. Raises ConfigError, RunFailed."""
    if unknown := set(peers) - set(PEERS):
        raise ConfigError(f"--peer {', '.join(sorted(unknown))}: unknown; expected {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory(prefix="mome-bench-") as folder:
        storage, num_processes = Storage(), max(1, job.workers) * job.threads
        if shards is None:
            progress("writing shards")
            shards = join(folder, "shards")
            write_photos(storage, photos, shards, job.samples, num_processes)
        if not is_local(shards):
            raise ConfigError(f"--shards {shards}: the peers read local files only (webdataset cannot read s3://)")
        num_shards = len(load_manifest(storage, shards).shards)
        if num_shards < num_processes:
            needed = f"the peers need one for each of {num_processes} processes. Use fewer workers"
            raise ConfigError(f"{shards} has {num_shards} shards; {needed}")
        if not job.vocabulary:
            progress("training a vocabulary")
            job = replace(job, vocabulary=join(folder, "vocabulary.txt"))
            trained = Tokenizer.train(iter_captions(storage, shards), 8192)
            storage.write(job.vocabulary, trained.vocabulary_file)
        job = replace(job, shards=shards)
        jobs = {name: replace(job, contender=name) for name in ("mome", DECODE, *peers)}
        if job.num_ops:
            jobs |= {f"{name}/off": replace(jobs[name], num_ops=0) for name in ("mome", *peers)}
        measured: dict[str, list[Measurement]] = {label: [] for label in jobs}
        for number in range(rounds):
            labels = list(jobs)
            for label in labels[number % len(labels) :] + labels[: number % len(labels)]:
                progress(f"round {number + 1} of {rounds}: {label}")
                measured[label].append(run_job(jobs[label], Path(folder)))
    result = _table({name: measured[name] for name in ("mome", *peers)})
    result["decode_limit"] = median(run["samples"] / run["cpu_seconds"] for run in measured[DECODE])
    if job.num_ops:
        result["without_rand_augment"] = _table({name: measured[f"{name}/off"] for name in ("mome", *peers)})
    processors = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = processors[0].strip() if processors else platform.machine()
    load: dict[str, Any] = {"samples": job.samples, "batch": job.batch_size, "workers": job.workers}
    load |= {"threads": job.threads, "rounds": rounds, "rand_augment": bool(job.num_ops)}
    load |= {"peer_processes": num_processes, "cores": os.cpu_count(), "processor": processor}
    outputs = {name: measured[name][0]["output"] for name in ("mome", *peers)}
    load |= {"load": os.getloadavg()[0], "data": ", ".join(map(str, photos)) or shards, "outputs": outputs}
    return result | {"settings": load | {"packages": {name: version(name) for name in PACKAGES}}}


def _table(measured: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Return the figures of some contenders, and how many times faster ours is than each peer."""
    rate = {name: [run["samples"] / run["cpu_seconds"] for run in runs] for name, runs in measured.items()}
    speeds = {name: median(run["samples"] / run["seconds"] for run in runs) for name, runs in measured.items()}
    ratios = {name: [our / their for our, their in zip(rate["mome"], rate[name], strict=True)] for name in rate}
    return {
        "samples_per_core_second": {name: median(rates) for name, rates in rate.items()},
        "cpu_seconds_per_1000": {name: median(1000 / speed for speed in rates) for name, rates in rate.items()},
        "spread": {name: [min(rates), max(rates)] for name, rates in rate.items()},
        "samples_per_second": speeds,
        "times_faster": {name: median(ratios[name]) for name in ratios if name != "mome"},
    }


def run_job(job: BenchJob, folder: Path) -> Measurement:
    """Measure one contender in a fresh interpreter, limited to one thread per worker."""
    request, answer = folder / "job.json", folder / "result.json"
    request.write_text(json.dumps(asdict(job)))
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "jobs.bench.loader", str(request), str(answer)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env={**os.environ, **ONE_THREAD}, **pipes)
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:  # this command is being interrupted: let the contender end its workers
            process.send_signal(signal.SIGINT)
            process.wait()
    if process.returncode or not answer.exists():
        last = "\n".join(output.strip().splitlines()[-12:])
        raise RunFailed(f"{job.contender} ended with status {process.returncode} and no measurement:\n{last}")
    return json.loads(answer.read_text())


def measure(job: BenchJob) -> Measurement:
    """Return samples, wall-clock seconds and CPU seconds of one contender, after its warm-up."""
    if job.contender == DECODE:
        samples = itertools.islice(iter_samples(Storage(), job.shards), job.samples)
        data = [jpeg for sample in samples if (jpeg := image_bytes(sample.members))[:2] == b"\xff\xd8"]
        started = time.thread_time()
        for jpeg in data:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        return {"samples": len(data), "cpu_seconds": max(time.thread_time() - started, 1e-9)}
    with ExitStack() as stack:
        if job.contender in PEERS:
            batches = peer_batches(job)
        else:
            config, storage = job.config(), Storage()
            tokenizer, stage = Tokenizer.load(storage, job.vocabulary), config.stages[0]
            loader = Loader(config, stage, batch_groups(config, stage), storage, tokenizer, 0, 1)
            stack.callback(loader.close)
            batches = ((batch.image, batch.text) for batch in loader.batches(0))
        for _ in itertools.islice(batches, 6):  # the warm-up
            pass
        before, started, counted = tree_cpu_seconds(), time.perf_counter(), 0
        while counted < job.samples:
            image, _ = next(batches)
            counted += len(image)
        seconds = time.perf_counter() - started
        resolution = 1 / os.sysconf("SC_CLK_TCK")  # of CPU times; few samples may have been loaded since the warm-up
        cpu_seconds = max(tree_cpu_seconds() - before, resolution)
    output = f"{str(image.dtype).removeprefix('torch.')} {'x'.join(str(side) for side in image.shape[1:])}"
    return {"samples": counted, "seconds": seconds, "cpu_seconds": cpu_seconds, "output": output}


def tree_cpu_seconds() -> float:
    """Return the CPU seconds of this process and its descendants; parents count their children that ended."""
    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, its own and of its children
    return total


def peer_batches(job: BenchJob) -> Batches:
    """Yield batches of another loader without end: webdataset's tutorial, or the pipeline of open_clip's training data.

    Images are (B, 3, S, S) float32 in [-1, 1]; text is (B, 3, L) int64: the tokens, the masked tokens and the labels.
    """
    config = job.config()
    stage, augmentation, size = config.stages[0], config.data.augment, config.model.image_size
    shards, workers = load_manifest(Storage(), job.shards).shards, max(1, job.workers) * job.threads
    tokenizer, masked = BertTokenizer(job.vocabulary), stage.masking.mlm_probability
    collator = DataCollatorForLanguageModeling(  # whole words, which it can only replace by [MASK]
        tokenizer, whole_word_mask=True, mlm_probability=masked, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    padding = {"padding": "max_length", "truncation": True, "max_length": stage.max_text_length}

    def example(sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Crop, flip, augment and normalise an image in torchvision's order, and tokenize one of its captions."""
        with Image.open(io.BytesIO(next(sample[name] for name in IMAGES if sample.get(name)))) as opened:
            image = opened.convert("RGB")
        counter = CounterRandom(random.getrandbits(64))
        top, left, height, width = draw_crop(image.height, image.width, size, augmentation.crop_scale, counter)
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for _ in range(augmentation.num_ops):
            operation, sign = random.choice(list(OPERATIONS.values())), random.choice((-1.0, 1.0))
            if random.random() < augment.APPLIED:
                image = operation(image, augmentation.magnitude / augment.MAX_MAGNITUDE, sign)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        caption = random.choice(json.loads(sample["json"])["captions"])
        text = tokenizer(caption, **padding, return_special_tokens_mask=True, return_offsets_mapping=True)
        return pixels.sub_(0.5).div_(0.5), text

    def collate(examples: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor]:
        """Stack the images and mask whole words with transformers' collator."""
        images, texts = zip(*examples, strict=True)
        masked = collator([dict(text) for text in texts])
        ids, labels = masked["input_ids"], masked["labels"]
        return torch.stack(images), torch.stack([torch.where(labels == IGNORED, ids, labels), ids, labels], dim=1)

    urls = [join(job.shards, shard.name) for shard in shards]
    # A larger shuffle buffer than a worker's samples would never fill.
    available = max(1, sum(shard.samples for shard in shards) // workers)
    if job.contender == "open_clip_composition":
        stages = (
            webdataset.SimpleShardList(urls * 20),  # an incomplete batch at the end of the list is dropped
            webdataset.detshuffle(bufsize=2000, initial=500, seed=config.seed),
            webdataset.split_by_node,
            webdataset.split_by_worker,
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(min(5000, available), initial=min(1000, available)),
            webdataset.map(example),
            webdataset.batched(stage.global_batch_size, collation_fn=collate, partial=False),
        )
        pipeline = webdataset.DataPipeline(*stages).repeat()
        return iter(webdataset.WebLoader(pipeline, None, False, num_workers=workers, persistent_workers=True))
    dataset = webdataset.WebDataset(urls, shardshuffle=100, seed=config.seed)
    dataset = dataset.shuffle(min(1000, available)).map(example).repeat()
    return iter(DataLoader(dataset, stage.global_batch_size, num_workers=workers, collate_fn=collate))


def _affine(image: Image.Image, inverse: tuple[float, ...]) -> Image.Image:
    """Apply the transform whose inverse maps output to input pixels, as Pillow expects it."""
    mode, resampling = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, mode, inverse, resampling, fillcolor=augment.FILL)


# Name → operation(image, strength 0 … 1, sign ±1), equal to those of pipeline/data/examples/augment.py.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "Identity": lambda image, x, sign: image,
    "AutoContrast": lambda image, x, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, x, sign: ImageOps.equalize(image),
    "Brightness": lambda image, x, sign: ImageEnhance.Brightness(image).enhance(np.interp(x, (0, 1), augment.ENHANCE)),
    "Sharpness": lambda image, x, sign: ImageEnhance.Sharpness(image).enhance(np.interp(x, (0, 1), augment.ENHANCE)),
    "ShearX": lambda image, x, sign: _affine(image, (1, -sign * x * augment.SHEAR, 0, 0, 1, 0)),
    "ShearY": lambda image, x, sign: _affine(image, (1, 0, 0, -sign * x * augment.SHEAR, 1, 0)),
    "TranslateX": lambda image, x, sign: _affine(image, (1, 0, -sign * x * augment.TRANSLATE * image.width, 0, 1, 0)),
    "TranslateY": lambda image, x, sign: _affine(image, (1, 0, 0, 0, 1, -sign * x * augment.TRANSLATE * image.height)),
    "Rotate": lambda image, x, sign: image.rotate(
        sign * x * augment.ROTATE, Image.Resampling.BILINEAR, fillcolor=augment.FILL
    ),
}


def write_photos(storage: Storage, folders: tuple[Path, ...], url: str, samples: int, min_shards: int) -> None:
    """Write `samples` samples of the folders' photos, repeated under new keys, or of synthetic images, to `url`."""
    photos: list[Sample] = []
    for folder in folders:  # pairs of a captions.jsonl, or images with .txt files
        source = folder / "captions.jsonl" if (folder / "captions.jsonl").exists() else folder
        imported = importers.read_source(source, importers.find_kind(source), Problems())
        pairs = [sample for sample in imported.samples if "captions" in json.loads(sample.get("json", b"{}"))]
        if not pairs:
            raise DataError(f"{folder}: no photo with a caption. Expected captions.jsonl, or a .txt next to each image")
        photos += pairs
    originals = itertools.cycle(photos or synthetic_photos())
    repeated = ({**photo, "__key__": f"{n:07d}"} for n, photo in zip(range(samples), originals, strict=False))
    per_shard = max(1, min(MAX_SAMPLES_PER_SHARD, samples // max(MIN_SHARDS, min_shards)))
    importers.write_shards(storage, repeated, url, per_shard, overwrite=True)


def synthetic_photos(count: int = 48) -> Iterator[Sample]:
    """Yield images of coloured noise with a photo's frequency spectrum, and captions of common words."""
    generator = np.random.default_rng(SEED)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT, np.fft.rfftfreq(WIDTH)[None] * WIDTH)
    amplitudes = 1 / np.maximum(frequency, 1) ** SLOPE
    for number in range(count):
        captions = [" ".join(generator.choice(WORDS, size=generator.integers(8, 16))) for _ in range(5)]
        waves = np.fft.rfft2(generator.standard_normal((3, HEIGHT, WIDTH))) * amplitudes
        fields = np.fft.irfft2(waves, s=(HEIGHT, WIDTH))
        fields -= fields.mean(axis=(1, 2), keepdims=True)
        light, red, blue = fields / fields.std(axis=(1, 2), keepdims=True)
        colours = np.stack([light + 0.5 * red, light, light + 0.5 * blue], axis=2)
        pixels = np.ascontiguousarray(np.clip(128 + CONTRAST * colours, 0, 255).astype(np.uint8))
        record = {"image_id": number, "captions": captions}
        jpeg = simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420")
        yield {"__key__": f"{number}", "jpg": jpeg, "json": json.dumps(record).encode()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    random.seed(SEED)
    Path(sys.argv[2]).write_text(json.dumps(measure(BenchJob(**json.loads(Path(sys.argv[1]).read_text())))))
