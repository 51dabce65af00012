"""Start of a stage: its vocabulary, weights of an equal or another architecture, resized positions, frozen parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.models.model import HeadConfig, Model
from pipeline.models.resize import resize_grid, resize_relative_grid, resize_text_distances
from pipeline.training.checkpoint.weights import load_weights, save_weights, stage_url
from pipeline.training.prepare import check_start, choose_tokenizer, coverage_alert, load_coverage, measure_coverage
from pipeline.training.stages import Stage, build_stage_model, load_matching, prepare_experts
from tests.support.tiny_model import VOCABULARY, tiny_config

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(VOCABULARY - 5))]


def staged(tmp_path: Path, *stages: dict[str, Any], **model: Any) -> RunConfig:
    """Return the tiny run with changes to its first stages."""
    values = tiny_config().model_dump(mode="json")
    values |= {"output": str(tmp_path), "model": values["model"] | model}
    for stage, change in zip(values["stages"], stages, strict=False):
        stage |= change
    return validate(values, "tiny")


def finish(config: RunConfig, model: Model | None = None, seed: int = 0) -> str:
    """Save the weights of the first stage as its run does, and return their URL."""
    stage, model = Stage(config, 0), model or build_model(config.model, VOCABULARY, seed=seed)
    metadata = {"config": stage.run.model_dump(mode="json"), "stage": stage.name, "step": 4}
    save_weights(Storage(), stage_url(config, 0), dict(model.state_dict()), TOKENS, metadata)
    return stage_url(config, 0)


def model_of_stage(config: RunConfig, index: int) -> Model:
    return build_stage_model(Stage(config, index), Storage(), VOCABULARY)


def check(config: RunConfig, tokens: list[str] = TOKENS) -> None:
    """Check the weights that the first stage starts from."""
    check_start(Stage(config, 0), Storage(), Tokenizer(tokens))


# ---- weights of another size or architecture


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_next_stage_reads_larger_images_with_resized_positions(tmp_path: Path, positions: str) -> None:
    config = staged(tmp_path, {}, {"image_size": 32}, positions=positions)
    assert [Stage(config, index).run.model.image_size for index in range(3)] == [16, 32, 16]
    as_second = Stage(config, 1).run
    assert Stage(config, 0).run is config
    assert Stage(as_second, 1).run is as_second
    assert Stage(as_second, 2).run.model == config.model
    before = model_of_stage(config, 0)
    with torch.no_grad():
        for parameter in before.parameters():  # because the relative table is initialised to zero
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    finish(config, before)
    old, new = before.state_dict(), model_of_stage(config, 1).state_dict()
    if positions == "relative":
        rule, name = resize_relative_grid(old["positions.image"], 4), "positions.image"
    else:
        rule, name = resize_grid(old["image_embedding.positions"], 4, "bicubic"), "image_embedding.positions"
    assert torch.equal(new[name], rule)
    assert all(torch.equal(new[other], old[other]) for other in old if other != name)
    with pytest.raises(ConfigError, match=r"stages.language.image_size: image_size 30 must be a multiple"):
        staged(tmp_path, {}, {"image_size": 30})


def test_start_from_another_image_size_and_text_length(tmp_path: Path) -> None:
    short = staged(tmp_path, *[{"max_text_length": 8}] * 4, max_text_length=8, image_size=24)
    before = model_of_stage(short, 0)
    config = staged(tmp_path, {"start_from": finish(short, before)})
    check(config)
    expected = resize_text_distances(before.state_dict()["positions.text"], 12)
    assert torch.equal(model_of_stage(config, 0).state_dict()["positions.text"], expected)


ABSOLUTE = {"positions": "absolute"}
OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"layers": 3}, {}, "layers 3 there, 2 here"),
    (ABSOLUTE, {}, "positions 'absolute' there, 'relative' here"),
    ({"layer_scale": None}, {}, "layer_scale False there, True here"),
    (ABSOLUTE | {"max_text_length": 12}, ABSOLUTE | {"max_text_length": 20}, "model.max_text_length: 20"),
]


def test_only_an_equal_architecture_and_vocabulary_are_accepted(tmp_path: Path) -> None:
    """Both values are in the message. Keys that matter in training alone may differ."""
    for number, (theirs, ours, message) in enumerate(OTHERS):
        url = finish(staged(tmp_path / str(number), **theirs))
        with pytest.raises(ConfigError, match=r"stages\.vision\.start_from.*" + message):
            check(staged(tmp_path, {"start_from": url}, **ours))
    url = finish(staged(tmp_path, drop_path=0.3, init_std=0.1, layer_scale=1e-5))
    config = staged(tmp_path, {"start_from": url})
    check(config)
    with pytest.raises(ConfigError, match=rf"set tokenizer.vocabulary to {url}/vocab.txt"):
        check(config, [*TOKENS[:-1], "another"])


# ---- modules absent from the weights, and those that a stage does not train


def test_missing_module_is_rejected_unless_declared_absent_or_copied(tmp_path: Path) -> None:
    config = staged(tmp_path, {}, {}, {"experts": {"vision_language": "language"}})
    state = build_model(config.model, VOCABULARY, seed=9).state_dict()
    partial = {name: tensor for name, tensor in state.items() if "vision_language" not in name}
    model = build_model(config.model, VOCABULARY, seed=5)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: blocks.1.experts.vision_language"):
        load_matching(model, partial, "language")
    load_matching(model, partial, "language", frozenset({"vision_language_expert"}))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if "vision_language" in name else state[name]), name
    prepared = prepare_experts(model, partial, config.stages[2])
    copied = {name for name in prepared if "vision_language" in name}
    assert copied
    assert all(torch.equal(prepared[n], state[n.replace("vision_language", "language")]) for n in copied)
    # The second image's modality starts as the first one's.
    model = build_model(config.model, VOCABULARY, HeadConfig(nlvr2=True))
    start = load_weights(Storage(), finish(config, seed=9))
    load_matching(model, model.resize_state(start.tensors, start.config.model), "nlvr2")
    state = model.state_dict()
    assert torch.equal(state["image_embedding.second"], state["image_embedding.modality"])
    learnt = state | {"image_embedding.second": torch.ones(32)}
    assert torch.equal(model.resize_state(learnt, config.model)["image_embedding.second"], torch.ones(32))


def trained(config: RunConfig, index: int) -> set[str]:
    model = model_of_stage(config, index)
    return {model.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trap_11_modules_no_objective_reads_are_not_trained(tmp_path: Path) -> None:
    """With relative positions there are no text positions; the top vision and language experts learn from ITC alone."""
    start = {"start_from": "random"}
    fused = trained(staged(tmp_path, {}, {}, {"objectives": {"mlm": {}}} | start), 2)
    assert not {"vision_expert.upper", "language_expert.upper", "itc_head"} & fused
    assert {"vision_expert.upper", "language_expert.upper"} <= trained(staged(tmp_path, {}, {}, start), 2)
    assert "text_embedding.positions" not in model_of_stage(staged(tmp_path), 0).state_dict()


def test_trap_13_text_stage_trains_no_image_positions(tmp_path: Path) -> None:
    """The release trains one table and the last norm, which images share, on text alone."""
    published = {"freeze": ["attention", "vision_expert", "image_embedding"], "start_from": "random"}
    moved = trained(staged(tmp_path, {}, published), 1)
    assert {"positions.text", "norm"} <= moved
    assert not {"positions.image", "positions.cross"} & moved
    published["freeze"] = [*published["freeze"], "norm"]
    assert "norm" not in trained(staged(tmp_path, {}, published), 1)


# ---- the vocabulary


@pytest.mark.parametrize(("word", "lowercase"), [("Rome", False), ("rome", True)])
def test_lowercasing_follows_the_vocabulary_or_the_key(tmp_path: Path, word: str, lowercase: bool) -> None:
    def chosen(stated: bool | None, key: bool | None = None) -> bool:
        """Return `lowercase` with a tokenizer_config.json that states do_lower_case, unless None."""
        if stated is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": stated}))
        config = staged(tmp_path)
        keys = {"vocabulary": str(tmp_path / "vocab.txt"), "lowercase": key}
        tokenizer = config.tokenizer.model_copy(update=keys)
        return choose_tokenizer(config.model_copy(update={"tokenizer": tokenizer}), Storage()).lowercase

    (tmp_path / "vocab.txt").write_text("\n".join((*SPECIALS, "the", word)))
    assert [chosen(None), chosen(lowercase)] == [lowercase] * 2
    message = rf"tokenizer\.lowercase: .*do_lower_case {str(not lowercase).lower()}; set the key"
    with pytest.raises(ConfigError, match=message):
        chosen(not lowercase)
    assert [chosen(not lowercase, key) for key in (True, False)] == [True, False]


def test_unknown_tokens_are_measured_per_source_and_reported(tmp_path: Path, make_tar: Any, caplog: Any) -> None:
    captions = {"english": "a red cat", "arabic": "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621"}
    english, arabic = urls = [str(tmp_path / name) for name in captions]
    for url, caption in zip(urls, captions.values(), strict=True):
        Path(url).mkdir()
        Path(url, "0.tar").write_bytes(make_tar({str(n): {"txt": caption.encode()} for n in range(5)}))
        index_shards(Storage(), url)
    run, tokenizer, smaller = (
        str(tmp_path / "run"),
        Tokenizer([*SPECIALS, "a", "red", "cat"]),
        Tokenizer([*SPECIALS, "a"]),
    )
    assert load_coverage(Storage(), run, tokenizer) is None
    assert measure_coverage(Storage(), run, tokenizer, urls) == {english: 0.0, arabic: 1.0}
    assert f"100.0% of the tokens of {arabic}" in caplog.text
    unknown = load_coverage(Storage(), run, tokenizer)
    assert unknown == {english: 0.0, arabic: 1.0} == measure_coverage(Storage(), run, tokenizer, [])
    assert load_coverage(Storage(), run, smaller) is None, "of another vocabulary"
    assert measure_coverage(Storage(), run, smaller, [english]) == {english: pytest.approx(2 / 3, abs=1e-6)}
    Path(run, "vocabulary.json").write_text("[1]")
    assert load_coverage(Storage(), run, smaller) is None, "a malformed record is ignored"
    limits = [coverage_alert(unknown) for unknown in ({}, {"a": 0.01}, {"a": 0.0101, "b": 0.0})]
    assert [alert != "" for alert in limits] == [False, False, True], "above one percent"
