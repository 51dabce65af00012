"""`mome plan` on a small run: the keys of its JSON, its table, and its scaling chart."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from jobs.distributed import with_workers
from jobs.plan import Target, as_json_object, as_text, plan_run
from jobs.plan_chart import scaling_svg
from pipeline.config.errors import ConfigError
from pipeline.planning.estimate import Assumptions
from pipeline.planning.hardware import ACCELERATORS, NETWORKS
from tests.support.tiny_model import tiny_config


def target(gpus: int = 2) -> Target:
    return Target(ACCELERATORS["h100"], NETWORKS["ib-400"], gpus, Assumptions(price=2.5))


@pytest.fixture(scope="module")
def plans():
    return plan_run(with_workers(tiny_config(zero_stage=2), 2), target(), scaling=True)


def test_json_has_the_documented_keys(plans):
    found = as_json_object(plans, target())
    promised = {"parameters", "flops_per_step", "memory_bytes_per_gpu", "step_seconds", "hours", "cost"}
    assert promised <= found.keys()
    assert {"states", "gradients", "activations", "total"} <= found["memory_bytes_per_gpu"].keys()
    assert len(found["stages"]) == 4
    assert found["cost"] == pytest.approx(sum(stage["hours"] for stage in found["stages"]) * 2 * 2.5)
    assert found["hours"] == pytest.approx(16 * found["step_seconds"] / 3600 / 0.97)  # four stages of four steps


def test_the_table_names_every_zero_stage_and_assumption(plans):
    told = as_text(plans, target())
    for expected in ("stage vision:", "ZeRO 0", "ZeRO 3", "largest micro-batch", "mfu 0.35", "h100: 989 TFLOPS"):
        assert expected in told


def test_scaling_chart_is_complete_and_lists_its_assumptions(plans):
    root = ElementTree.fromstring(scaling_svg(plans, target(), "tiny & small"))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "tiny & small" in texts
    assert "mfu 0.35" in texts
    assert sum(1 for _ in root.iter("{http://www.w3.org/2000/svg}polyline")) == 4


def test_lines_below_the_chart_neither_overlap_nor_overflow(plans):
    root = ElementTree.fromstring(scaling_svg(plans, target(), "tiny"))
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    lines = [each for each in root.iter("{http://www.w3.org/2000/svg}text") if each.attrib["font-size"] == "10"]
    assert len(lines) >= 10
    tops = [float(each.attrib["y"]) for each in lines]
    assert all(below - above >= 12 for above, below in itertools.pairwise(tops))
    assert tops[-1] < height
    assert all(float(each.attrib["x"]) + 6.5 * len(each.text or "") < width for each in lines)  # wide letters


def test_more_gpus_than_examples_are_rejected():
    with pytest.raises(ConfigError, match="12 rows only"):
        plan_run(tiny_config(), target(gpus=16), scaling=False)
