"""`mome demo`: the whole path on drawn scenes, from nothing to a report, in a few minutes on two cores."""

from __future__ import annotations

import shutil
from typing import Any

from jobs.configs import configs_folder
from jobs.console import ProgressDisplay, notify
from jobs.evaluate import evaluate_run
from jobs.interrupts import Interrupts
from jobs.pretrain import pretrain
from jobs.report import reported
from pipeline.config.load import load_config
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.tracking.locations import tracking_uri


def demo(overrides: list[str], fresh: bool) -> dict[str, Any]:
    """Draw the scenes, run the three stages, evaluate on scenes never trained on, and say where everything lies."""
    config = load_config(configs_folder() / "demo.yaml", overrides)
    if fresh:
        shutil.rmtree(config.folder, ignore_errors=True)
    notify(f"mome demo: {len(config.stages)} stages on drawn scenes, in {config.folder}", style="bold")
    with reported(config), Interrupts(config) as interrupts:
        with ProgressDisplay() as show:
            trained = pretrain(config, show, interrupts)
        if not trained:
            notify(f"{config.folder} is finished already; `mome demo --fresh` trains again")
        result = evaluate_run(config)
    _tell(config, result)
    return result


def _tell(config: RunConfig, result: dict[str, Any]) -> None:
    retrieval, mlm = result["retrieval"], result["mlm"]
    notify(
        f"\nOn {result['pairs']} scenes never trained on, by contrastive scores alone:\n"
        f"  picture to caption R@1 {retrieval['image_to_text']['r1']:.1%}, "
        f"caption to picture R@1 {retrieval['text_to_image']['r1']:.1%} (chance {retrieval['chance']['r1']:.1%})\n"
        f"  masked words guessed with their picture {mlm['accuracy']:.1%}, "
        f"with another {mlm['accuracy_other_image']:.1%}, from text alone {mlm['accuracy_text_only']:.1%}\n\n"
        f"Report      {result['report']}\n"
        f"Checkpoint  {result['checkpoint']}\n"
        f"MLflow      mlflow ui --backend-store-uri {redact(tracking_uri(config))}"
    )
