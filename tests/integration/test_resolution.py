"""A run whose last stage reads larger images than its first: trained, evaluated, exported and imported."""

from pathlib import Path

from tests.support.ranks import run_ranks

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def _train(folder: str) -> None:
    from pipeline.config.load import load_config
    from pipeline.training.loop import train

    stages = [
        {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}},
        {"name": "larger", "sources": {"scenes": 1.0}, "objectives": {"itc": {}, "mlm": {}}, "image_size": 40},
    ]
    shared = {"steps": 3, "global_batch_size": 8, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    scenes = {"shards": f"{folder}/scenes", "synthetic": {"scenes": 40, "image_size": 40}}
    unseen = {"shards": f"{folder}/unseen", "synthetic": {"scenes": 12, "seed": 2, "image_size": 40}}
    overrides = {
        "output": folder,
        "model": {"width": 32, "layers": 2, "heads": 2, "vision_language_layers": 1, "image_size": 24, "patch_size": 8},
        "sources": {"scenes": scenes, "pictures": {"shards": f"{folder}/scenes", "type": "images"}, "unseen": unseen},
        "stages": [stage | shared for stage in stages],
        "cluster.workers": 1,
    }
    train(load_config(DEMO, [f"{key}={value!r}" for key, value in overrides.items()]), lambda progress: None)


def test_later_stage_may_read_larger_images(tmp_path: Path) -> None:
    from jobs.convert import export_weights, import_weights
    from jobs.evaluate import evaluate_checkpoint
    from pipeline.data.storage import Storage
    from pipeline.training.checkpoint.weights import load_weights

    run_ranks(_train, 1, str(tmp_path))
    vision, larger = (load_weights(Storage(), f"{tmp_path}/demo/stages/{name}") for name in ("0-vision", "1-larger"))
    assert [w.config.model.image_size for w in (vision, larger)] == [24, 40]
    assert [len(w.tensors["positions.image"]) for w in (vision, larger)] == [5**2 + 3, 9**2 + 3]
    metrics = evaluate_checkpoint(f"{tmp_path}/demo", track=False, report=tmp_path / "report.html")
    assert metrics["retrieval"] is not None
    assert metrics["reconstruction"]["stage"] == "vision"
    # Exported, imported and evaluated on the same pairs, it is the same model.
    run, out, imported = f"{tmp_path}/demo", f"{tmp_path}/vlmo.pt", f"{tmp_path}/imported"
    assert export_weights(run, "vlmo", out)["left_out"][0] == "image_embedding.mask"
    import_weights(out, "vlmo", imported, vocabulary=f"{run}/vocab.txt")
    again = evaluate_checkpoint(imported, source=f"{tmp_path}/unseen", track=False, report=tmp_path / "imported.html")
    assert again["retrieval"] == metrics["retrieval"]
    assert again["mlm"]["accuracy"] == metrics["mlm"]["accuracy"]
