"""A data stream over a faulty network: no sample is lost, repeated or replaced (contracts C1 and C7)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import fingerprint
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join
from pipeline.objectives import batch_groups
from tests.support.fault_proxy import FaultProxy

OUTAGE = float(os.environ.get("MOME_OUTAGE_SECONDS", "5"))  # the bar is 60; continuous integration waits less


def run_config(shards: str, storage: StorageConfig) -> RunConfig:
    stage = {"name": "pairs", "sources": {"pairs": 1.0}, "steps": 50, "global_batch_size": 20, "max_text_length": 12}
    values = {
        "name": "test",
        "storage": storage.model_dump(),
        "model": {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4},
        "sources": {"pairs": {"shards": shards}},
        "data": {"streams": 4, "shuffle_window": 2},
        "stages": [stage | {"objectives": {"itc": {}, "mlm": {}}}],
    }
    return validate(values, "test")


@pytest.mark.parametrize(
    ("shards", "faults", "outage"),
    [
        (80, {"unavailable": 0.02, "cut": 0.01, "latency": 0.02}, 0.0),
        (40, {"unavailable": 0.2, "cut": 0.1, "short": 0.1, "lost": 0.05}, 0.0),
        (40, {"latency": 0.02}, OUTAGE),
    ],
    ids=["bar", "heavy", "outage"],
)
def test_stream_over_a_faulty_network_equals_undisturbed(
    s3, make_pairs, shards: int, faults: dict[str, float], outage: float
):
    folder, url = make_pairs("pairs", [2] * shards), s3.url("pairs")
    index_shards(Storage(), folder)
    with ThreadPoolExecutor(8) as pool:
        names, plain = sorted(os.listdir(folder)), Storage(s3.config)
        list(pool.map(lambda name: plain.upload(Path(folder, name), join(url, name)), names))
    tokenizer = Tokenizer.train(
        [f"picture {n} shows a thing in way {way}" for n in range(2 * shards) for way in "abc"], 200
    )
    local = run_config(folder, StorageConfig())
    expected = fingerprint(
        local, local.stages[0], batch_groups(local, local.stages[0]), Storage(), tokenizer, range(shards // 10)
    )
    with FaultProxy(s3.endpoint, seed=1, **faults) as proxy:
        settings = {"endpoint_url": proxy.endpoint, "retry_timeout_seconds": max(20.0, 2 * outage)}
        remote = run_config(url, s3.config.model_copy(update=settings))
        if outage:
            proxy.away(outage, after=30)
        assert (
            fingerprint(
                remote,
                remote.stages[0],
                batch_groups(remote, remote.stages[0]),
                Storage(remote.storage),
                tokenizer,
                range(shards // 10),
            )
            == expected
        )
    assert bool(outage) == bool(proxy.injected["away"])
    assert outage or sum(proxy.injected.values()) > 0, "choose another seed: nothing went wrong"
