"""VLMo and word-patch alignment equal the published implementations (contract C8): outputs and gradients to 1e-5."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config.schema import VLMoConfig
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import alignment_outputs
from pipeline.models.vlmo import VLMo
from pipeline.objectives import cross_entropy, wpa
from pipeline.objectives.itc import itc_loss

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
PUBLISHED_MLM_WEIGHT = 0.25


def reference(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the tensors of a published implementation; skip the test without them."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"reference tensors are not here: {path}")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class Golden:
    def __init__(self, name: str) -> None:
        meta, tensors = reference(name)
        self.state, self.input, self.output = (
            {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            for prefix in ("state.", "input.", "output.")
        )
        self.config = VLMoConfig(
            width=meta["embed_dim"],
            layers=meta["depth"],
            heads=meta["num_heads"],
            vision_language_layers=max(meta["depth"] - meta["vlffn_start_layer_index"], 1),
            image_size=meta["image_size"],
            patch_size=meta["patch_size"],
            positions="relative" if meta["relative_position"] else "absolute",
            max_text_length=meta["max_text_len_of_initckpt"],
            layer_scale=0.1 if meta["layer_scale"] else None,
        )
        self.model = VLMo(self.config, meta["vocab_size"])
        result = self.model.load_state_dict(FORMATS["vlmo"].read(self.state, self.config), strict=False)
        assert not result.unexpected_keys
        self.missing = {self.model.part_of(name) for name in result.missing_keys}

    def forwards(self) -> dict[str, ForwardInput]:
        image, keep = self.input["image"].permute(0, 2, 3, 1), self.input["text_masks"].bool()
        text, masked = self.input["text_ids"], self.input["text_ids_mlm"]
        everywhere = torch.arange(text.shape[1]).expand_as(text)
        return {
            "image": ForwardInput(("itc", "tokens"), image=image),
            "text": ForwardInput(("itc", "tokens"), text=text, text_keep=keep),
            "pair": ForwardInput(("itm", "tokens"), image=image, text=text, text_keep=keep),
            "masked": ForwardInput(("mlm",), image=image, text=masked, text_keep=keep, mask_positions=everywhere),
        }

    def mlm_loss(self, outputs: ForwardOutput) -> Tensor:
        labels = self.input["text_labels_mlm"]
        return cross_entropy(outputs["masked"]["mlm"], labels) / (labels >= 0).sum()


@pytest.fixture(params=["vlmo_relative", "vlmo_absolute"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


agree = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def test_every_forward_equals_the_release_conversion_is_exact_and_sizes_are_inferred(golden: Golden) -> None:
    expected, config = golden.output, golden.config
    assert golden.missing == set()
    with torch.no_grad():
        out = golden.model(golden.forwards())
        agree(golden.model.pooler(out["pair"]["tokens"][:, 0]), expected["vl_cls_feats"])
    for modality in ("image", "text"):  # padded positions too
        for ours, theirs in (("tokens", "feats"), ("itc", "cls"), ("itc_vl", "cls_vl")):
            agree(out[modality][ours], expected[f"{modality}_{theirs}"])
    agree(out["pair"]["itm"], expected["itm_logits_pos"])
    agree(out["pair"]["tokens"], torch.cat([expected["vl_text_feats"], expected["vl_image_feats"]], dim=1))
    agree(out["masked"]["mlm"], expected["mlm_logits"])
    logits = out["image"]["scale"] * out["image"]["itc"] @ out["text"]["itc"].T
    agree(logits, expected["itc_i2t_logits"])
    agree(logits.T, expected["itc_t2i_logits"])
    back = FORMATS["vlmo"].write(golden.model.state_dict(), config)
    computed = {name for name in golden.state if config.positions == "absolute" or ".position_emb" not in name}
    assert set(back) == computed
    assert all(torch.equal(back[name], golden.state[name]) for name in computed)
    hidden = {key: getattr(config, key) for key in ("heads", "max_text_length")}  # no release is so small
    section = VLMoConfig(**FORMATS["vlmo"].infer(golden.state, hidden))
    assert section.architecture() == config.architecture()


def test_losses_and_gradients_equal_the_release(golden: Golden) -> None:
    summed, forwards = list[Tensor](), {name: one for name, one in golden.forwards().items() if name != "pair"}
    golden.model.text_embedding.norm.register_forward_pre_hook(lambda _, args: summed.append(args[0]))
    out = golden.model({n: replace(one, heads=tuple({*one.heads} - {"tokens"})) for n, one in forwards.items()})
    image, text, apart = out["image"], out["text"], torch.arange(len(out["image"]["itc"]))
    contrasts = [itc_loss(image[f"itc{x}"], text[f"itc{x}"], image[f"scale{x}"], apart) for x in ("", "_vl")]
    contrast, masked = sum(contrasts) / 2 / len(apart), PUBLISHED_MLM_WEIGHT * golden.mlm_loss(out)
    agree(contrast, golden.output["itc_loss"])
    agree(masked, golden.output["mlm_loss_weighted"])
    for tensor in summed:
        tensor.retain_grad()
    (contrast + masked).backward()
    ours = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in golden.model.named_parameters()}
    published = FORMATS["vlmo"].write(ours, golden.config)
    expected = {k.removeprefix("grad."): t for k, t in golden.output.items() if k.startswith("grad.")}
    assert len(expected) >= 6
    agree({name: published[name] for name in expected}, expected)
    assert all((published[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in expected.items())
    gradients = list(ours.values())
    if golden.config.positions == "relative":
        # The release zeroes the text's absolute positions instead of removing them. They have no effect, but their
        # gradient is in its norm: the sum over examples of the gradient of the embeddings they would be added to.
        gradients.append(sum(tensor.grad.sum(dim=0) for tensor in summed))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    agree(norm, golden.output["grad_norm_mlm_plus_itc"])


def test_language_stage_equals_the_release() -> None:
    golden = Golden("vlmo_language_stage")
    masked = replace(golden.forwards()["masked"], image=None)
    with torch.no_grad():
        out = golden.model({"text": replace(masked, heads=("tokens",), mask_positions=None), "masked": masked})
    assert golden.missing == {"vision_language_expert", "itc_head", "itm_head"}
    agree(out["text"]["tokens"], golden.output["text_feats"])
    agree(golden.mlm_loss(out), golden.output["textmlm_loss"])


def test_word_patch_alignment_equals_the_release() -> None:
    meta, golden = reference("word_patch_alignment")
    assert (meta["beta"], meta["iterations"], meta["inner"]) == (wpa.BETA, wpa.OUTER, 1)
    features = [golden[f"input.{name}_features"].requires_grad_() for name in ("text", "image")]
    keep, labels = golden["input.text_mask"], golden["input.itm_labels"]
    visible = golden["input.image_mask"][:, 1:].long() - 1  # -1 at padding
    words = torch.zeros_like(keep, dtype=torch.int64)
    forward = ForwardInput(("alignment",), text=words, text_keep=keep, visible_patches=visible)
    aligned = alignment_outputs(forward, torch.cat(features, dim=1), patch_size=32)
    cost = wpa.wpa_cost(aligned["words"], aligned["patches"])
    plan = wpa.wpa_plan(cost, aligned["words_keep"], aligned["patches_keep"])
    loss = wpa.wpa_loss(**aligned, matched=labels == 1) / len(labels)
    agree(torch.nn.functional.pad(plan, (1, 0)), golden["output.transport_plan"])  # without the image's [CLS]
    agree((cost * plan).sum(dim=(1, 2)).detach(), golden["output.distance"])
    agree(loss.detach(), golden["output.wpa_loss"])
    for name, gradient in zip(("text", "image"), torch.autograd.grad(loss, features), strict=True):
        agree(gradient, golden[f"output.grad_{name}_features"])
