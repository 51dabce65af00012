"""`mome import` and `mome export`: weights are unchanged by conversion, and unusable files are rejected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from jobs.cli import FORMAT_HELP, app
from jobs.convert import export_weights, import_weights
from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageBERTConfig, TransformerConfig, ViLTConfig, ViTConfig, VLMoConfig
from pipeline.data.storage import Storage
from pipeline.inference import build_trained_model
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
from pipeline.models.model import HeadConfig
from pipeline.training.checkpoint import load_weights

WORDS = 11
TINY = VLMoConfig(
    width=64,
    layers=3,
    heads=1,
    vision_language_layers=1,
    image_size=32,
    patch_size=8,
    max_text_length=12,
    drop_path=0.1,
)
CONTAINERS = {
    "bare": lambda state: state,
    "lightning": lambda state: {"state_dict": state, "epoch": 3},
    "deepspeed": lambda state: {"module": {f"module.{name}": t for name, t in state.items()}, "global_steps": 7},
    "beit": lambda state: {"model": state},
}


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    return str(tmp_path / "vocab.txt")


def published(heads: HeadConfig = HeadConfig(), config: VLMoConfig = TINY) -> dict[str, Tensor]:
    return FORMATS["vlmo"].write(build_model(config, WORDS, heads, seed=5).state_dict(), config)


def save(path: Path, contents: Any) -> str:
    torch.save(contents, path)
    return str(path)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def import_tiny(folder: Path, state: Any, *overrides: str, out: str = "imported", **options: Any) -> dict[str, Any]:
    """Import a file of these contents from and to `folder`; return the description."""
    path = save(folder / "vlmo.pt", state)
    return import_weights(path, "vlmo", f"{folder}/{out}", ["max_text_length=12", *overrides], **options)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_round_trips_to_the_same_tensors(container: str, tmp_path: Path, vocabulary: str) -> None:
    state = published()
    index = {"relative_position_index": torch.zeros(17, 17, dtype=torch.int64)} if container == "lightning" else {}
    described = import_tiny(tmp_path, CONTAINERS[container](state | index), vocabulary=vocabulary)
    weights = load_weights(Storage(), f"{tmp_path}/imported")
    assert equal(weights.tensors, build_model(TINY, WORDS, seed=5).state_dict())
    assert weights.config.model == TINY
    assert (described["absent"], described["objectives"]) == ([], ["mlm", "itc", "itm", "mlm"])
    assert export_weights(f"{tmp_path}/imported", "vlmo", f"{tmp_path}/back.pt")["left_out"] == []
    assert equal(torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"], state)


def test_our_own_safetensors_need_no_sizes_and_rebuild_the_model(tmp_path: Path, vocabulary: str) -> None:
    heads = HeadConfig(answers=5, nlvr2=True)
    import_tiny(tmp_path, published(heads), out="first", vocabulary=vocabulary)
    export_weights(f"{tmp_path}/first", "safetensors", f"{tmp_path}/own.safetensors")
    import_weights(f"{tmp_path}/own.safetensors", "safetensors", f"{tmp_path}/second", vocabulary=vocabulary)
    first, second = (load_weights(Storage(), f"{tmp_path}/{name}") for name in ("first", "second"))
    assert first.config.model == second.config.model
    assert (second.stage, second.config.stages[-2].num_answers) == ("imported_statements", 5)
    for weights in (first, second):
        assert equal(build_trained_model(weights).state_dict(), build_model(TINY, WORDS, heads, seed=5).state_dict())


def test_half_precision_is_read_as_float32(tmp_path: Path, vocabulary: str) -> None:
    import_tiny(tmp_path, {name: t.half() for name, t in published().items()}, vocabulary=vocabulary)
    assert {t.dtype for t in load_weights(Storage(), f"{tmp_path}/imported").tensors.values()} == {torch.float32}


def test_language_stage_reports_the_absent_fusion_expert(tmp_path: Path, vocabulary: str) -> None:
    stage = {n: t for n, t in published().items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    described = import_tiny(tmp_path, {"state_dict": stage}, "vision_language_layers=1", vocabulary=vocabulary)
    assert described["absent"] == ["vision_language_expert"]
    assert load_weights(Storage(), f"{tmp_path}/imported").absent == {"vision_language_expert"}


def test_mismatch_lists_names_and_is_rejected_unless_allowed(tmp_path: Path, vocabulary: str) -> None:
    state = published() | {"rank_output.weight": torch.zeros(1, 64), "rank_output.bias": torch.zeros(1)}
    state["itm_score.fc.bias"] = torch.zeros(3)
    del state["pooler.dense.bias"]
    with pytest.raises(CheckpointError) as error:
        import_tiny(tmp_path, state, vocabulary=vocabulary)
    assert "missing: pooler.dense.bias" in str(error.value)
    assert "unexpected: rank_output.bias, rank_output.weight" in str(error.value)
    assert "itm_score.fc.bias (is (3,), must be (2,))" in str(error.value)
    allowed = ("rank_output.*", "itm_score.fc.bias", "pooler.dense.bias")
    import_tiny(tmp_path, state, vocabulary=vocabulary, may_differ=allowed)
    tensors = load_weights(Storage(), f"{tmp_path}/imported").tensors
    assert "itm_head.classify.bias" not in tensors
    assert "itm_head.classify.weight" in tensors


class Armed:
    """Object whose unpickling calls a function, so that an unsafe loader executes it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))


def test_file_that_would_run_code_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="would run code that it names"):
        import_tiny(tmp_path, {"state_dict": published(), "callbacks": Armed()})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"no checkpoint", "neither safetensors nor"), (b"", "neither safetensors nor"), (None, "no such file")],
)
def test_file_that_is_not_a_checkpoint_is_named(contents: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vlmo.pt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message):
        import_weights(str(path), "vlmo", f"{tmp_path}/imported")


def test_state_dict_with_other_values_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="also holds epoch"):
        import_tiny(tmp_path, {"state_dict": published() | {"epoch": 3}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format_name": "onnx"}, "--format onnx: unknown; known: vlmo"),
        ({"overrides": ["max_text_length=12"], "vocabulary": None}, "--vocabulary"),
        ({"overrides": ["max_text_length=12", "widht=3"]}, "did you mean 'width'"),
        ({"overrides": ["max_text_length=12", "kind=vit"]}, "kind"),
        ({}, "give image_size=… and max_text_length=…"),
    ],
)
def test_invalid_arguments_are_rejected_with_a_remedy(
    arguments: dict[str, Any], message: str, tmp_path: Path, vocabulary: str
) -> None:
    values = {"format_name": "vlmo", "out": f"{tmp_path}/imported", "vocabulary": vocabulary, **arguments}
    with pytest.raises(ConfigError) as error:
        import_weights(save(tmp_path / "vlmo.pt", published()), **values)
    assert message in str(error.value)


def test_weights_are_never_overwritten(tmp_path: Path, vocabulary: str) -> None:
    import_tiny(tmp_path, published(), vocabulary=vocabulary)
    with pytest.raises(ConfigError, match="which would be lost"):
        import_tiny(tmp_path, published(), vocabulary=vocabulary)


def test_export_lists_parameters_the_format_cannot_hold(tmp_path: Path, vocabulary: str) -> None:
    state = build_model(TINY, WORDS, HeadConfig("pixels"), seed=5).state_dict()
    own = tmp_path / "own.safetensors"
    safetensors.torch.save_file(state, own, {"model": TINY.model_dump_json()})
    import_weights(str(own), "safetensors", f"{tmp_path}/imported", vocabulary=vocabulary)
    told = export_weights(f"{tmp_path}/imported", "vlmo", f"{tmp_path}/out.pt")
    assert told["left_out"] == [
        "image_embedding.mask",
        "mim_head.predict.bias",
        "mim_head.predict.weight",
    ]


SMALL = {"width": 64, "layers": 2, "heads": 1, "image_size": 32, "patch_size": 8, "max_text_length": 12}
SECTIONS: dict[str, TransformerConfig] = {
    "vlmo": TINY,
    "vilt": ViLTConfig(**SMALL, longest_side=48),
    "vilt-hf": ViLTConfig(**SMALL, longest_side=48),
    "vit": ViTConfig(**SMALL),
    "beit": TINY,
    "bert": ImageBERTConfig(**SMALL),
    "safetensors": ViTConfig(**SMALL),
}


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_round_trips(format_name: str, tmp_path: Path, vocabulary: str) -> None:
    section = SECTIONS[format_name]
    state = build_model(section, WORDS, seed=5).state_dict()
    with torch.no_grad():
        for name in state.keys() & {"image_embedding.modality"}:
            state[name].zero_()  # BEiT has no such parameter
    own = tmp_path / "own.safetensors"
    safetensors.torch.save_file(state, own, {"model": section.model_dump_json()})
    import_weights(str(own), "safetensors", f"{tmp_path}/first", vocabulary=vocabulary)
    told = export_weights(f"{tmp_path}/first", format_name, f"{tmp_path}/out.safetensors")
    published = safetensors.torch.load_file(tmp_path / "out.safetensors")
    torch.save({"state_dict": published}, tmp_path / "out.pt")  # a safetensors header would contain the sizes
    sizes = [f"{key}={value}" for key, value in section.model_dump(mode="json").items() if value is not None]
    import_weights(f"{tmp_path}/out.pt", format_name, f"{tmp_path}/second", sizes, vocabulary=vocabulary)
    back = load_weights(Storage(), f"{tmp_path}/second")
    assert set(state) - set(back.tensors) == set(told["left_out"])
    assert back.config.model.architecture() == section.architecture()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.tensors.items())


def test_both_commands_work_from_the_command_line(tmp_path: Path, vocabulary: str) -> None:
    path, imported, back = save(tmp_path / "vlmo.pt", published()), f"{tmp_path}/imported", f"{tmp_path}/b.safetensors"
    options = ["--format", "vlmo", "--vocabulary", vocabulary, "--json"]
    first = CliRunner().invoke(app, ["import", path, "max_text_length=12", "--out", imported, *options])
    assert json.loads(first.stdout)["model"]["width"] == TINY.width
    second = CliRunner().invoke(app, ["export", imported, "--format", "vlmo", "--out", back, "--json"])
    assert json.loads(second.stdout)["path"] == back
    assert equal(safetensors.torch.load_file(back), published())


def test_the_help_names_every_format() -> None:
    assert set(re.findall(r"[a-z]+(?:-hf)?", FORMAT_HELP.partition(":")[2])) >= set(FORMATS)
