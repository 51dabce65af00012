"""`mome plan` on a small run: the keys of its JSON, its table, and its scaling chart."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from jobs.distributed import with_workers
from jobs.plan import SIZES, Target, as_json_object, as_text, plan_run, scaling_svg
from pipeline.config.errors import ConfigError
from pipeline.planning.estimate import Assumptions
from pipeline.planning.hardware import ACCELERATORS, NETWORKS
from tests.support.tiny_model import tiny_config

SVG = "{http://www.w3.org/2000/svg}"
TARGET = Target(ACCELERATORS["h100"], NETWORKS["ib-400"], 2, Assumptions(price=2.5))


@pytest.fixture(scope="module")
def plans():
    return plan_run(with_workers(tiny_config(zero_stage=2), 2), TARGET, scaling=True)


def test_json_has_the_documented_keys(plans):
    plan = as_json_object(plans, TARGET)
    assert {"parameters", "flops_per_step", "memory_bytes_per_gpu", "step_seconds", "hours", "cost"} <= plan.keys()
    assert {"states", "gradients", "activations", "total"} <= plan["memory_bytes_per_gpu"].keys()
    assert len(plan["stages"]) == 4
    assert plan["cost"] == pytest.approx(sum(stage["hours"] for stage in plan["stages"]) * 2 * 2.5)
    assert plan["hours"] == pytest.approx(16 * plan["step_seconds"] / 3600 / 0.97)  # four stages of four steps


def test_the_table_names_every_zero_stage_and_assumption(plans):
    text = as_text(plans, TARGET)
    for expected in ("stage vision:", "ZeRO 0", "ZeRO 3", "largest micro-batch", "mfu 0.35", "h100: 989 TFLOPS"):
        assert expected in text


def test_scaling_chart_is_complete_and_its_assumptions_are_legible(plans):
    root = ElementTree.fromstring(scaling_svg(plans, TARGET, "tiny & small"))
    texts = list(root.iter(f"{SVG}text"))
    assert {"tiny & small", "mfu 0.35"} <= {text.text for text in texts}
    assert sum(1 for _ in root.iter(f"{SVG}polyline")) == 4
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    lines = [text for text in texts if text.attrib["font-size"] == "10"]
    assert len(lines) >= 10
    tops = [float(line.attrib["y"]) for line in lines]
    assert all(below - above >= 12 for above, below in itertools.pairwise(tops))
    assert tops[-1] < height
    assert all(float(line.attrib["x"]) + 6.5 * len(line.text or "") < width for line in lines)  # wide letters


def test_scaling_curve_ends_where_a_rank_would_have_no_example(plans):
    for plan in plans:
        assert [point.gpus for point in plan.scaling] == [1, 2, 4, 8]  # of batches of 12
        first, last = plan.scaling[0], plan.scaling[-1]
        assert plan.efficiency(last) == pytest.approx(last.samples_per_second / (8 * first.samples_per_second))
        assert len({point.samples_per_second for point in plan.scaling}) == 4
    assert SIZES[-1] == 1024


def test_more_gpus_than_examples_are_rejected():
    target = Target(TARGET.accelerator, TARGET.network, 16, TARGET.assumptions)
    with pytest.raises(ConfigError, match="12 rows only"):
        plan_run(tiny_config(), target, scaling=False)
