"""`mome plan` on a small run: the keys of its JSON, its table, and its scaling chart."""

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from jobs.cluster import for_ranks
from jobs.plan import SIZES, Target, as_json_object, as_text, plan_command, plan_run, scaling_svg
from pipeline.config.errors import ConfigError
from pipeline.planning.estimate import ACCELERATORS, NETWORKS, Assumptions
from tests.support.tiny_model import tiny_config

SVG = "{http://www.w3.org/2000/svg}"
TARGET = Target(ACCELERATORS["h100"], NETWORKS["ib-400"], 2, Assumptions(price=2.5))


@pytest.fixture(scope="module")
def plans():
    return plan_run(for_ranks(tiny_config(zero_stage=2), workers=2), TARGET, scaling=True)


def test_json_and_table_name_every_documented_key_zero_stage_and_assumption(plans):
    plan = as_json_object(plans, TARGET)
    assert {"parameters", "flops_per_step", "memory_bytes_per_gpu", "step_seconds", "hours", "cost"} <= plan.keys()
    assert {"states", "gradients", "activations", "total"} <= plan["memory_bytes_per_gpu"].keys()
    assert len(plan["stages"]) == 4
    assert plan["cost"] == pytest.approx(sum(stage["hours"] for stage in plan["stages"]) * 2 * 2.5)
    assert plan["hours"] == pytest.approx(16 * plan["step_seconds"] / 3600 / 0.97)  # four stages of four steps
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


def test_scaling_ends_where_a_rank_would_have_no_example(plans):
    for plan in plans:
        assert [point.gpus for point in plan.scaling] == [1, 2, 4, 8]  # of batches of 12
        first, last = plan.scaling[0], plan.scaling[-1]
        assert plan.efficiency(last) == pytest.approx(last.samples_per_second / (8 * first.samples_per_second))
        assert len({point.samples_per_second for point in plan.scaling}) == 4
    assert SIZES[-1] == 1024
    with pytest.raises(ConfigError, match="12 rows only"):
        plan_run(tiny_config(), replace(TARGET, gpus=16), scaling=False)
    with pytest.raises(ConfigError, match="--accelerator h1000: did you mean 'h100'"):
        plan_command(tiny_config(), "h1000", "ib-400", None, Assumptions(), None, None)
