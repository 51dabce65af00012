"""The quarantine counts and records bad samples per source, and stops the run above the allowed rate."""

import io
import pickle

import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.data.quarantine import MIN_SEEN, BadRecord, BadSample, Quarantine, judging


def record(number: int, source: str = "pairs") -> BadRecord:
    return BadRecord(source, "00000.tar", f"key{number}", 512, 0, 3, number, "image", "corrupt JPEG", "another")


def test_counts_are_per_source_and_a_rate_above_the_bound_is_fatal():
    quarantine = Quarantine(max_bad_rate=0.01)
    quarantine.deliver(["pairs"] * MIN_SEEN + ["more"] * 1000, [record(1), record(1, "more")])
    assert quarantine.bad == {"pairs": 1, "more": 1}
    assert quarantine.seen == {"pairs": 100, "more": 1000}
    assert [(bad.source, bad.key) for bad in quarantine.new] == [("pairs", "key1"), ("more", "key1")]
    message = r"source 'pairs': 3 of 200 samples are bad \(1\.5%\).*key2 in 00000\.tar.*max_bad"
    with pytest.raises(DataError, match=message):
        quarantine.deliver(["pairs"] * 100, [record(1), record(2)])


def test_rate_needs_a_minimum_of_samples_before_the_end():
    quarantine = Quarantine(max_bad_rate=0.01)
    quarantine.deliver(["pairs"] * 10, [record(1)])
    quarantine.deliver([], [], is_last=True)
    quarantine.deliver(["pairs"] * 10, [record(2)])
    with pytest.raises(DataError, match=r"2 of 20"):
        quarantine.deliver([], [], is_last=True)


def test_only_faults_of_the_sample_become_bad_samples_with_reproducible_encodable_reasons():
    unicode = UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "x")
    for fault in (ValueError("long " * 1000), RecursionError(), KeyError(6), AssertionError(), unicode):
        with pytest.raises(BadSample, match=type(fault).__name__) as raised, judging("image"):
            raise fault
        assert raised.value.stage == "image"
        assert len(raised.value.reason.encode()) <= 300
    bad = BadSample("caption", "half a \ud83d")
    for other in (StorageError("away"), DataError("cut"), MemoryError(), KeyboardInterrupt(), bad):
        with pytest.raises(type(other)) as unchanged, judging("image"):
            raise other
        assert unchanged.value is other
    copy = pickle.loads(pickle.dumps(bad))  # noqa: S301
    assert (copy.stage, copy.reason) == ("caption", "half a \\ud83d")
    assert BadSample("image", f"cannot identify {io.BytesIO()}").reason == "cannot identify <_io.BytesIO object>"
