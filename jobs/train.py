"""`mome train` and `mome demo`: train the stages of a run on Ray, evaluate the last one, and write the run's report."""

from __future__ import annotations

import shutil
from typing import Any

from jobs.configs import configs_folder
from jobs.console import ProgressDisplay, notify, status
from jobs.distributed import preflight_on_ray
from jobs.evaluate import evaluate_run
from jobs.interrupts import Interrupts
from jobs.pretrain import pretrain
from jobs.report import reported
from pipeline.config.load import load_config
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.tracking.locations import tracking_uri


def run_and_evaluate(config: RunConfig, remedy: str = "change `name` to start another run") -> dict[str, Any]:
    """Train every unfinished stage, then evaluate; return what `mome train --json` prints.

    `remedy` is the advice printed if all stages are finished already.
    """
    with reported(config), Interrupts(config) as interrupts:
        with ProgressDisplay() as display:
            trained = pretrain(config, display, interrupts)
        if not trained:
            notify(f"{config.folder}: every stage is finished already; {remedy}")
        return evaluate_run(config) if config.evaluation.source else {"checkpoint": config.folder}


def run_preflight(config: RunConfig) -> dict[str, Any]:
    """Check the run on every rank without training; return the checks by name."""
    with status("checking on every rank"):
        return preflight_on_ray(config)


def run_demo(overrides: list[str], fresh: bool) -> dict[str, Any]:
    """Train and evaluate the demo's three stages on generated scenes, and print a summary."""
    config = load_config(configs_folder() / "demo.yaml", overrides)
    if fresh:
        shutil.rmtree(config.folder, ignore_errors=True)
    notify(f"mome demo: {len(config.stages)} stages on generated scenes, in {config.folder}", style="bold")
    result = run_and_evaluate(config, "`mome demo --fresh` trains again")
    retrieval, mlm = result["retrieval"], result["mlm"]
    notify(
        f"\nResults on {result['pairs']} held-out scenes, by contrastive scores:\n"
        f"  image-to-text R@1 {retrieval['image_to_text']['r1']:.1%}, "
        f"text-to-image R@1 {retrieval['text_to_image']['r1']:.1%} (chance {retrieval['chance']['r1']:.1%})\n"
        f"  masked words predicted with their image {mlm['accuracy']:.1%}, "
        f"with another image {mlm['accuracy_other_image']:.1%}, from the text alone {mlm['accuracy_text_only']:.1%}\n\n"
        f"Report      {result['report']}\n"
        f"Checkpoint  {result['checkpoint']}\n"
        f"MLflow      mlflow ui --backend-store-uri {redact(tracking_uri(config))}"
    )
    return result
