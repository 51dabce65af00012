"""`--preflight`: one step of every stage on every rank, test writes to storage and MLflow, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from tests.support.ranks import run_ranks


def config_in(folder: Path, **more) -> RunConfig:
    shards = str(folder / "scenes")
    pairs = {"itc": {}, "itm": {}, "mlm": {}}
    values = {
        "name": "checked",
        "output": str(folder / "runs"),
        "model": {"width": 32, "layers": 2, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 8},
        "sources": {
            "scenes": {"shards": shards, "synthetic": {"scenes": 40, "image_size": 24}},
            "pictures": {"shards": shards, "type": "images"},
        },
        "data": {"streams": 2},
        "stages": [
            {
                "name": "vision",
                "sources": {"pictures": 1.0},
                "objectives": {"mim": {}},
                "steps": 9,
                "global_batch_size": 8,
            },
            {"name": "pairs", "sources": {"scenes": 1.0}, "objectives": pairs, "steps": 9, "global_batch_size": 6},
        ],
        "engine": {"precision": "float32", "zero_stage": 2},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        **more,
    }
    return validate(values, "checked")


def _preflight(config: RunConfig) -> tuple[list[tuple[str, str]], str]:
    from pipeline.config.errors import MomeError
    from pipeline.training.preflight import preflight

    try:
        return [(item.name, item.message) for item in preflight(config, lambda _: None)], ""
    except MomeError as error:
        return [], str(error)


def test_every_stage_makes_a_step_and_leaves_nothing(tmp_path):
    from pipeline.tracking.mlflow_server import connect

    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()  # makes the database
    answers = run_ranks(_preflight, 2, config_in(tmp_path))
    assert [failure for _, failure in answers] == ["", ""]
    checks = dict(answers[0][0])
    assert list(checks) == ["storage", "tracking", "data and vocabulary", "stage vision", "stage pairs"]
    assert "deleted" in checks["storage"]
    assert "deleted" in checks["tracking"]
    assert "8 rows = 2 ranks x 1 micro-batches" in checks["stage vision"]
    assert not list((tmp_path / "runs").glob("*"))
    assert not client.search_runs([item.experiment_id for item in client.search_experiments()])


def test_failure_of_one_rank_is_reported_on_all(tmp_path):
    (tmp_path / "runs").write_text("a file where the runs' folder should be")
    answers = run_ranks(_preflight, 2, config_in(tmp_path))
    for _, failure in answers:
        assert "preflight, storage: rank 0" in failure
        assert "rank 1" in failure
