"""The weights that a run keeps, as MLflow's LoggedModels: checkpoints and hand-overs, with their step and results.

The files stay where they are; what is logged says where that is (`mome.url`), what they are and how they did, so that
`search_logged_models` ranks checkpoints. A model that a later run starts from is an input of that run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.tracking.journal import HAND_OVER, Journal
from pipeline.tracking.mlflow_client import ask
from pipeline.tracking.records import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

IS_EXTERNAL = "mlflow.model.isExternal"  # MLflow's own name for a model whose files it does not hold
_NOT_IN_NAMES = re.compile(r"[/:.%\"']")
_A_PAGE = 100


class LoggedModels:
    """Those of one campaign on one server."""

    def __init__(self, client: MlflowClient, experiment: str, campaign: Record, journal: Journal):
        self._client, self._experiment = client, experiment
        self._run, self._name, self._journal = campaign["run"], campaign.get("name", "run"), journal
        self._by_url: dict[str, str] | None = None
        self._by_step: dict[int, str] = {}
        self._pending: set[str] = set()  # ids of models that were created and not yet declared to be whole
        self._gone: set[str] | None = None

    def log(self, record: Record, run_id: str, stage: str) -> str | None:
        """Log weights, unless they are; returns the model's id, or None for weights that are no longer kept."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        url, step = record["url"], record["step"]
        if url in self._removed():
            return None
        model_id = self._known().get(url)
        if model_id is None:
            name = _NOT_IN_NAMES.sub("-", f"{self._name}-{stage}-{step:08d}")
            tags = {"mome.run": self._run, "mome.url": url, "mome.step": str(step), "mome.role": record["role"]}
            about = {"stage": stage, "step": str(step), "role": record["role"]}
            create = self._client.create_logged_model
            model = ask(create, self._experiment, name, run_id, tags | {IS_EXTERNAL: "true"}, about, "weights")
            model_id = self._remember(model)
        if model_id in self._pending:
            ask(self._client.finalize_logged_model, model_id, LoggedModelStatus.READY)
            self._pending.discard(model_id)
        if record["role"] == HAND_OVER:  # an output cannot be taken back, so checkpoints are none
            outputs = ask(self._client.get_run, run_id).outputs
            if model_id not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
                ask(self._client.log_outputs, run_id, [LoggedModelOutput(model_id, step)])
        return model_id

    def remove(self, url: str) -> None:
        """The weights at `url` were deleted: the model is too, and stays in the journal and in the run's metrics."""
        model_id = self._known().pop(url, None)
        if model_id is not None:
            self._by_step = {step: other for step, other in self._by_step.items() if other != model_id}
            ask(self._client.delete_logged_model, model_id)

    def at_step(self, step: int) -> str | None:
        """The weights of a global step, which an evaluation at that step is of."""
        self._known()
        return self._by_step.get(step)

    def start_from(self, url: str, run_id: str) -> str | None:
        """Make the weights at `url` an input of a run; returns the run that made them, where this server knows it."""
        from mlflow.entities import LoggedModelInput

        model = self._at(url)
        if model is None:
            return None
        inputs = ask(self._client.get_run, run_id).inputs
        if model.model_id not in {each.model_id for each in (inputs.model_inputs if inputs else ())}:
            ask(self._client.log_inputs, run_id, models=[LoggedModelInput(model.model_id)])
        return model.source_run_id

    def _at(self, url: str) -> LoggedModel | None:
        """This campaign's, or another's in any experiment."""
        own = self._known().get(url)
        if own is not None:
            return ask(self._client.get_logged_model, own)
        everywhere = [each.experiment_id for each in ask(self._client.search_experiments)]
        asked = f"tags.`mome.url` = '{url}'"
        found = ask(self._client.search_logged_models, everywhere, asked, max_results=1) if "'" not in url else []
        return found[0] if found else None

    def _known(self) -> dict[str, str]:
        """URL -> id, asked once."""
        if self._by_url is None:
            self._by_url = {}
            for model in self._all():
                self._remember(model)
        return self._by_url

    def _all(self) -> Iterator[LoggedModel]:
        asked, token = f"tags.`mome.run` = '{self._run}'", None
        while True:
            search = self._client.search_logged_models
            page = ask(search, [self._experiment], asked, max_results=_A_PAGE, page_token=token)
            yield from (model for model in page if "mome.url" in model.tags)
            token = page.token
            if not token:
                return

    def _remember(self, model: LoggedModel) -> str:
        from mlflow.entities import LoggedModelStatus

        assert self._by_url is not None
        self._by_url[model.tags["mome.url"]] = self._by_step[int(model.tags["mome.step"])] = model.model_id
        if model.status != LoggedModelStatus.READY:
            self._pending.add(model.model_id)
        return model.model_id

    def _removed(self) -> set[str]:
        """What the journal, read once, says is gone: replaying it then makes no model to delete it again."""
        if self._gone is None:
            self._gone = {record["url"] for record in self._journal.all_records() if record["kind"] == "model_gone"}
        return self._gone
