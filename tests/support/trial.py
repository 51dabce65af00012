"""Trials: every objective with every kind of model that learns it, trained for thirty steps on one synthetic batch.

The combinations come from the models, so a new kind or objective is included automatically. A loss that falls far, and
below what a model that ignores its input can reach, shows that the objective's whole path works.

Shapes: B examples, H x W pixels, L tokens, P patches, K masked positions per example, R regions, F features per region.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.configs import source_types
from pipeline.config import schema
from pipeline.config.load import validate
from pipeline.config.schema import MODEL_SECTIONS, RunConfig, SourceType, TransformerConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.training.collectives import Collectives
from pipeline.training.engine import learning_rate
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from tests.support.gradients import PlainEngine

STEPS = 30
ROWS = 12
VOCABULARY = 50
MASK = 4  # id of the mask token; ordinary tokens have larger ids
CLASSES, ANSWERS, VISUAL_TOKENS = 3, 6, 16

_SIZES: dict[str, Any] = {
    "width": 32, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 8, "max_text_length": 12, "init_std": 0.2,
    "drop_path": 0.0,
}  # fmt: skip
_SIZES_OF: dict[str, dict[str, Any]] = {
    "vlmo": {"vision_language_layers": 1},
    "vilt": {"longest_side": 24},
    "imagebert": {"max_regions": 6, "region_features": 8, "region_classes": 7, "dropout": 0.0},
    "dual_encoder": {"text_width": 24, "text_layers": 2, "text_heads": 2, "embedding": 16},
}
# Matching loss of a head that ignores its input, the entropy of the labels, by the kind of negatives: hard ones have
# one image and one text per pair (0.6365, and 0.6931).
COLLAPSED = {"hard": math.log(3) - 2 / 3 * math.log(2), "random": math.log(2)}


class Cell(NamedTuple):
    """An objective, a kind of model that learns it, and a source type; `keys` are further keys of the stage."""

    objective: str
    kind: str
    source_type: SourceType
    keys: dict[str, Any] = {}  # noqa: RUF012

    def __str__(self) -> str:
        keys = [key if isinstance(value, dict) else str(value) for key, value in self.keys.items()]
        return "-".join([self.objective, self.kind, self.source_type, *keys])

    def is_learnt(self, losses: list[float]) -> bool:
        """Return whether the loss fell to less than half, and well below that of a collapsed model."""
        start, end = losses[0], losses[-1]
        if self.objective == "wpa":  # a difference of distances, which starts near 0 and ends near -1
            return end < start - 0.5
        return end < 0.5 * start and (self.objective != "itm" or end < 0.8 * COLLAPSED[self.keys["negatives"]])


def cells() -> Iterator[Cell]:
    """Yield every combination that can be trained, with the stage keys that select each variant of an objective."""
    for objective in schema.OBJECTIVES:
        for kind in MODEL_SECTIONS:
            for source_type in source_types(kind)[objective]:
                choices: list[dict[str, Any]] = [{}]
                if objective == "itm":
                    has_itc = source_type in source_types(kind)["itc"]
                    choices = [{"negatives": negatives} for negatives in ("random", "hard")[: 1 + has_itc]]
                elif objective == "mim":
                    choices = [{"image_target": target} for target in get_args(schema.ImageTarget)]
                    if kind == "vilt":  # visual tokens require square images
                        choices.remove({"image_target": "visual_tokens"})
                    if kind in ("vlmo", "vit"):
                        decoder = {"width": 16, "layers": 1, "heads": 2}
                        choices.append({"image_target": "pixels", "image_decoder": decoder})
                yield from (Cell(objective, kind, source_type, keys) for keys in choices)


def tiny_run(
    kind: str, source_type: SourceType, objectives: dict[str, Any], model: Any = None, engine: Any = None, **stage: Any
) -> RunConfig:
    """Return a run of one stage of `ROWS` examples a step with a tiny model; `stage` are further keys of the stage."""
    settings = {
        "name": "trial", "sources": {"trial": 1.0}, "objectives": objectives, "steps": STEPS,
        "global_batch_size": ROWS, "max_text_length": _SIZES["max_text_length"], "num_classes": CLASSES,
        "num_answers": ANSWERS, "num_negative_texts": 3,
        "optimizer": {"lr": 1e-2, "warmup_steps": 3, "lr_schedule": "constant", "weight_decay": 0.0},
    }  # fmt: skip
    values = {
        "name": "trial", "model": {"kind": kind, **_SIZES, **_SIZES_OF.get(kind, {}), **(model or {})},
        "sources": {"trial": {"shards": "invented", "type": source_type}}, "data": {"streams": 1},
        "stages": [settings | stage], "engine": {"precision": "float32", **(engine or {})},
    }  # fmt: skip
    return validate(values, "trial")


def trial_config(cell: Cell) -> RunConfig:
    """Return a run of one stage that trains the cell together with the objectives it requires."""
    objectives: dict[str, Any] = {cell.objective: {}}
    keys = dict(cell.keys)
    if keys.get("negatives") == "hard":
        objectives["itc"] = {}
    if cell.objective == "wpa":
        objectives["itm"], keys["negatives"] = {}, "random"
    if keys.get("image_target") == "visual_tokens":
        keys["image_tokenizer"] = {"weights": "invented", "tokens": VISUAL_TOKENS}
    return tiny_run(cell.kind, cell.source_type, objectives, **keys)


class TrialState(NamedTuple):
    engine: PlainEngine
    step: TrainingStep
    batch: Batch


def begin(config: RunConfig, collectives: Collectives) -> TrialState:
    """Build the model, the step and the batch of a run's only stage."""
    stage, tokenizer = Stage(config, 0), None
    if stage.config.image_target == "visual_tokens":
        # Random weights: equal tokens for equal patches. Transformers takes seconds to load.
        from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

        from pipeline.models.visual_tokens import VisualTokenizer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = FlavaImageCodebookConfig(hidden_size=4, num_blocks_per_group=1, vocab_size=VISUAL_TOKENS)
            tokenizer = VisualTokenizer(FlavaImageCodebook(sizes))
    engine = PlainEngine(build_stage_model(stage, Storage(), VOCABULARY), stage.config.optimizer)
    half = invented_batch(stage.run.model, stage.source_type, 0, stage.config.global_batch_size // 2)
    return TrialState(engine, TrainingStep(engine, stage, collectives, tokenizer), twice(half))


def train(cell: Cell, collectives: Collectives) -> list[float]:
    """Train the cell for `STEPS` steps on the same batch; return its loss at each step, and after the last."""
    trial = begin(trial_config(cell), collectives)
    losses = []
    for number in range(STEPS + 1):
        losses.append(float(trial.step(trial.batch)[cell.objective]))
        trial.engine.step(learning_rate(number, STEPS, trial.step.stage.config.optimizer))
    return losses


# ---- synthetic data


def invented_batch(section: TransformerConfig, source_type: SourceType, step: int, size: int) -> Batch:
    """Return a global batch as a source of that type gives it; a function of the arguments alone."""
    draw, rows = torch.Generator().manual_seed(1000 + step), torch.arange(size)
    members: dict[str, Tensor] = {}
    short, long = section.image_size, getattr(section, "longest_side", section.image_size)
    sides = torch.tensor([(short, short), (short, long), (long, short)]).repeat(-(-size // 3), 1)[:size]  # of ViLT
    is_vilt = isinstance(section, schema.ViLTConfig)
    if source_type in ("pairs", "images", "labelled", "questions", "statements"):
        if is_vilt:
            members["image"] = _smooth(size, long, draw)
            members |= _patches_of_shapes(members["image"], sides, section.patch_size, draw)
        else:
            orders = [torch.randperm(section.grid**2, generator=draw)[:2] for _ in range(size)]
            members |= {"patch_positions": torch.stack(orders), "image": _smooth(size, long, draw)}
    if source_type in ("pairs", "text", "regions", "questions", "statements"):
        members |= _texts(size, draw)
    if source_type == "regions":
        assert isinstance(section, schema.ImageBERTConfig), "no other kind reads regions"
        members |= _regions(section, size, draw)
    if source_type == "statements":
        members |= {"second_image": _smooth(size, long, draw), "label": rows % 2}
        members |= {"second_image_size": sides.flip(1)} if is_vilt else {}
        members.pop("visible_patches", None)  # pairs of images use all patches
    if source_type == "labelled":
        members["label"] = rows % CLASSES
    if source_type == "questions":  # every second example has a single answer
        members["answers"] = torch.stack([rows % ANSWERS, (rows + 1) % ANSWERS], dim=1)
        members["answers"][::2, 1] = -1
        members["answer_scores"] = torch.tensor([[1.0, 0.0], [1.0, 0.3]])[rows % 2]
    keys = {"place": rows, "uid": rows + 100 * step, "image_id": rows, "source": torch.zeros_like(rows)}
    return Batch(step=step, **keys, **members)


def twice(batch: Batch) -> Batch:
    """Repeat each example next to itself, so that neither image nor text alone identifies the matching pairs."""
    rows = batch.rows(torch.arange(len(batch)).repeat_interleave(2))
    return replace(rows, place=torch.arange(len(rows)))


def _smooth(size: int, side: int, draw: torch.Generator) -> Tensor:
    """Return smooth images (B, H, W, 3) uint8, in which the neighbourhood of a patch helps to predict it."""
    coarse = torch.randint(0, 256, (size, 3, 3, 3), generator=draw).float()
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    return fine.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous()


def _patches_of_shapes(image: Tensor, sides: Tensor, patch_size: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Crop the images in place to `sides`, at the top left of their canvas; one patch of each is not visible."""
    for row, (height, width) in enumerate(sides.tolist()):
        image[row, height:] = 0
        image[row, :, width:] = 0
    orders = [torch.randperm(count, generator=draw) for count in (sides // patch_size).prod(dim=1).tolist()]
    visible = torch.full((len(orders), max(map(len, orders)) - 1), -1)
    for row, order in enumerate(orders):
        visible[row, : len(order) - 1] = order[:-1].sort().values
    positions = torch.stack([order[:2] for order in orders])
    positions[::4, 1] = -1
    return {"image_size": sides, "visible_patches": visible, "patch_positions": positions}


def _texts(size: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Return texts of 5 to 10 tokens with two masked tokens each, in every fourth example only one."""
    keep = torch.arange(10)[None] < torch.randint(5, 11, (size, 1), generator=draw)
    text = torch.randint(MASK + 1, VOCABULARY, (size, 10), generator=draw) * keep
    positions = torch.stack([torch.ones(size, dtype=torch.int64), 2 + torch.arange(size) % 3], dim=1)
    labels = text.gather(1, positions)
    labels[torch.arange(size) % 4 == 0, 1] = -100
    masked = {"masked_text": text.scatter(1, positions, MASK), "mask_positions": positions, "mask_labels": labels}
    return {"text": text, "text_keep": keep, **masked}


def _regions(section: schema.ImageBERTConfig, size: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Return four regions per image, three in every second; one or two are masked, and only the first is hidden."""
    keep = torch.ones(size, 4, dtype=torch.bool)
    keep[::2, -1] = False
    corners, sides = torch.rand(2, size, 4, 2, generator=draw) / 2
    location = torch.cat([corners, corners + sides, sides.prod(dim=-1, keepdim=True)], dim=-1)
    features = torch.randn(size, 4, section.region_features, generator=draw)
    positions = torch.stack([torch.arange(size) % 3, (torch.arange(size) + 1) % 3], dim=1)
    hidden = torch.zeros(size, 4, dtype=torch.bool).scatter(1, positions[:, :1], True)
    positions[::3, 1] = -1
    classes = torch.randint(0, section.region_classes, (size, 4), generator=draw)
    members = {"features": features * keep.unsqueeze(-1), "location": location * keep.unsqueeze(-1), "keep": keep}
    members |= {"class": classes, "positions": positions, "hidden": hidden}
    return {f"region_{name}": value for name, value in members.items()}
