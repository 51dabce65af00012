"""The quarantine counts and records bad samples per source, and stops the run above the allowed rate."""

from __future__ import annotations

import io
import pickle

import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.data.quarantine import MIN_SEEN, BadRecord, BadSample, Quarantine, judging


def record(number: int, source: str = "pairs") -> BadRecord:
    return BadRecord(source, "00000.tar", f"key{number}", 512, 0, 3, number, "image", "corrupt JPEG", "another")


def test_counts_and_records_are_per_source():
    quarantine = Quarantine(max_bad_rate=0.5)
    quarantine.deliver(["pairs"] * 6 + ["more"] * 2, [record(1), record(2), record(1, "more")])
    assert quarantine.bad == {"pairs": 2, "more": 1}
    assert quarantine.seen == {"pairs": 6, "more": 2}
    assert [r.key for r in quarantine.drain()] == ["key1", "key2", "key1"]
    assert quarantine.drain() == []


def test_rate_above_the_bound_is_fatal_with_source_and_example():
    quarantine = Quarantine(max_bad_rate=0.01)
    quarantine.deliver(["pairs"] * MIN_SEEN, [record(1)])
    with pytest.raises(
        DataError, match=r"source 'pairs': 3 of 200 samples are bad \(1\.5%\).*key2 in 00000\.tar.*max_bad"
    ):
        quarantine.deliver(["pairs"] * 100, [record(1), record(2)])


def test_rate_needs_a_minimum_of_samples_before_the_end():
    quarantine = Quarantine(max_bad_rate=0.01)
    quarantine.deliver(["pairs"] * 10, [record(1)])
    quarantine.finish()
    quarantine.deliver(["pairs"] * 10, [record(2)])
    with pytest.raises(DataError, match=r"2 of 20"):
        quarantine.finish()


def test_rates_are_per_source():
    quarantine = Quarantine(max_bad_rate=0.1)
    with pytest.raises(DataError, match=r"source 'more': 20 of 100"):
        quarantine.deliver(["pairs"] * 1000 + ["more"] * 100, [record(n, "more") for n in range(20)])


def test_record_is_plain_json():
    assert record(7).as_json() == {
        "source": "pairs",
        "shard": "00000.tar",
        "key": "key7",
        "offset": 512,
        "epoch": 0,
        "step": 3,
        "place": 7,
        "stage": "image",
        "reason": "corrupt JPEG",
        "replaced_by": "another",
    }


def test_bad_sample_crosses_processes():
    error = pickle.loads(pickle.dumps(BadSample("image", "corrupt")))  # noqa: S301
    assert (error.stage, error.reason) == ("image", "corrupt")


def test_only_faults_of_the_sample_become_bad_samples() -> None:
    faults = [
        ValueError("no"),
        RecursionError(),
        KeyError(6),
        AssertionError(),
        UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "x"),
    ]
    for fault in faults:
        with pytest.raises(BadSample, match=type(fault).__name__) as raised, judging("image"):
            raise fault
        assert raised.value.stage == "image"
        raised.value.reason.encode()
    for other in (
        StorageError("away"),
        DataError("cut"),
        MemoryError(),
        KeyboardInterrupt(),
        BadSample("caption", "x"),
    ):
        with pytest.raises(type(other)) as passed, judging("image"):
            raise other
        assert passed.value is other


def test_reasons_are_reproducible_and_encodable() -> None:
    assert BadSample("image", f"cannot identify {io.BytesIO()}").reason == "cannot identify <_io.BytesIO object>"
    assert BadSample("caption", "half a \ud83d").reason == "half a \\ud83d"
    with pytest.raises(BadSample) as raised, judging("members"):
        raise ValueError("long " * 1000)
    assert len(raised.value.reason) <= 300
