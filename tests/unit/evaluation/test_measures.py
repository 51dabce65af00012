"""Retrieval, masked words and patches, and measures of annotated sources equal their definitions on known models."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.load import validate
from pipeline.config.schema import ImageDecoderConfig, MaskingConfig, ObjectiveConfig, prompt_ensembles
from pipeline.data.contents.choices import ANSWERS, Choices, choices_of
from pipeline.data.contents.members import Annotation
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.evaluation import labelled, retrieval
from pipeline.evaluation import masked as filling
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.retrieval import Predictor, dot_products, rankings, recall_at_k, rerank
from pipeline.models.forward import ForwardInput
from pipeline.objectives.mim import patch_targets, patchify
from tests.support.fine_tuning_data import COLOURS, colour_of, run_config, write_set


def ranks_by_sorting(scores, query_id, candidate_id):
    """Sort each row with negatives first among equal scores, and return the rank of the first positive."""
    ranks = []
    for row, query in zip(scores, query_id, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_id[c] == query))
        ranks.append(1 + [candidate_id[c] == query for c in order].index(True))
    return np.array(ranks)


def evaluated(similarity, caption_of, image_id):
    scores, captions, ids = (torch.as_tensor(values) for values in (similarity, caption_of, image_id))
    ranked = rankings(scores.__getitem__, scores.T.__getitem__, captions, ids)
    return ranked, recall_at_k([direction.rank for direction in ranked], captions, ids)


@pytest.mark.parametrize(
    ("per_image", "levels", "duplicates"), [(1, None, 0), (5, None, 4), (1, 1, 4), (5, 3, 0), (5, 3, 4)]
)
def test_recall_and_reranked_ranks_equal_a_brute_force(per_image, levels, duplicates):
    """Similarities are drawn from few `levels` to produce ties, with some images shown twice."""
    random = np.random.default_rng(per_image)
    similarity, caption_of = random.normal(size=(37, 37 * per_image)), np.repeat(np.arange(37), per_image)
    similarity[caption_of, np.arange(len(caption_of))] += 1.0
    similarity = np.round(similarity * levels) / levels if levels else similarity
    image_id = random.permutation(370)[:37]
    image_id[:duplicates] = image_id[-1]
    ranked, recalls = evaluated(similarity, caption_of, image_id)
    second, requested = np.round(random.normal(size=similarity.shape) * 2), []

    def score(pairs):
        requested.append(pairs)
        return torch.tensor(second)[pairs[:, 0], pairs[:, 1]]

    reranked = rerank(ranked, 4, score, torch.tensor(caption_of), torch.tensor(image_id))
    caption_id = image_id[caption_of]
    for recall, new_ranks, coarse, exact, query_id, candidate_id in (
        (recalls.image_to_text, reranked[0], similarity, second, image_id, caption_id),
        (recalls.text_to_image, reranked[1], similarity.T, second.T, caption_id, image_id),
    ):
        ranks = ranks_by_sorting(coarse, query_id, candidate_id)
        expected = {f"r{k}": np.mean(ranks <= k) for k in (1, 5, 10)} | {"median_rank": np.median(ranks)}
        assert recall.values == expected | {"mean_rank": pytest.approx(np.mean(ranks), abs=1e-12)}
        best = np.argsort(-coarse, axis=1, kind="stable")[:, :4]
        lifted = coarse.copy()
        np.put_along_axis(lifted, best, 1000 + np.take_along_axis(exact, best, axis=1), axis=1)
        assert new_ranks.tolist() == ranks_by_sorting(lifted, query_id, candidate_id).tolist()
    assert len(requested[0].unique(dim=0)) == len(requested[0]) <= 4 * sum(similarity.shape)


def test_ranks_are_equal_in_blocks_and_equal_scores_keep_their_order(monkeypatch):
    """The vectors include equal ones, whose float32 sums would differ with the order of summation."""
    torch.manual_seed(0)
    for levels, k in itertools.product((1, 2, 5, 1000), (1, 3, 10, 90)):
        scores = torch.randint(0, levels, (40, 90)).float()
        best = rankings(scores.__getitem__, scores.T.__getitem__, torch.arange(90) % 40, torch.arange(40), keep=k)
        assert torch.equal(best.image_to_text.best, scores.argsort(dim=1, descending=True, stable=True)[:, :k])
    images, texts = (F.normalize(torch.randn(n, 96), dim=1) for n in (130, 650))
    images[40:60], texts[300:400] = images[7], texts[11]
    captions, ids = torch.arange(130).repeat_interleave(5), torch.arange(130)
    expected, _ = evaluated((images.double() @ texts.double().T).float(), captions, ids)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(retrieval, "_ROWS", rows)
        result = rankings(dot_products(images, texts), dot_products(texts, images), captions, ids)
        pairs = (pair for directions in zip(result, expected, strict=True) for pair in zip(*directions, strict=True))
        assert all(torch.equal(*pair) for pair in pairs)


def test_margins_ties_perfect_models_duplicates_and_chance(monkeypatch):
    ranked, _ = evaluated([[0.9, 0.5, 0.1], [0.2, 0.3, 0.7]], [0, 0, 1], [4, 9])
    torch.testing.assert_close(ranked.image_to_text.margin, torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(ranked.text_to_image.margin, torch.tensor([0.7, 0.2, 0.6]))
    _, equal = evaluated(np.zeros((30, 30)), np.arange(30), np.arange(30))
    assert equal.image_to_text == equal.text_to_image
    assert [equal.image_to_text.values[key] for key in ("r1", "r5", "r10", "median_rank")] == [0.0, 0.0, 0.0, 30]
    caption_of = np.arange(20).repeat(5)
    _, perfect = evaluated((np.arange(20)[:, None] == caption_of[None]).astype(float), caption_of, np.arange(20))
    assert perfect.image_to_text.values == perfect.text_to_image.values
    assert perfect.image_to_text.values["r1"] == perfect.image_to_text.values["mean_rank"] == 1.0
    similarity = np.array([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 1.0]])
    recalls = [evaluated(similarity, np.arange(3), ids)[1] for ids in ([7, 7, 8], [7, 6, 8])]
    assert [recall.image_to_text.values["r1"] for recall in recalls] == [1.0, pytest.approx(1 / 3)]
    with pytest.raises(ValueError, match="NaN"):
        evaluated(np.full((3, 3), np.nan), np.arange(3), np.arange(3))

    monkeypatch.setattr(retrieval, "KS", (1, 2, 10))
    for counts in ((1, 1, 1, 1), (2, 1, 3), (1, 4), (1,)):
        ids = torch.arange(len(counts))
        captions = ids.repeat_interleave(torch.tensor(counts))
        recall, orders = recall_at_k([ids, captions], captions, ids)[0], [*itertools.permutations(captions.tolist())]
        for k in (1, 2, 10):
            hits = [query in order[:k] for order in orders for query in range(len(counts))]
            assert recall.chance[f"r{k}"] == pytest.approx(sum(hits) / len(hits), abs=1e-12), (counts, k)


def test_whole_words_are_masked_whatever_the_limit_and_the_other_image_never_has_equal_content(held_out, tokenizer):
    masked = filling.mask_captions(held_out, MaskingConfig(), tokenizer)
    captions = zip(held_out.tokens, masked.rows, masked.positions, masked.labels, strict=True)
    for tokens, row, positions, labels in captions:
        original = dict(zip(positions, labels, strict=True))
        assert {row[p] for p in positions} == {tokenizer.mask_id}
        assert [original.get(p, token) for p, token in enumerate(row)] == list(tokens.ids)
        for word, places in filling.words_of(tokens.word_of[position] for position in positions).items():
            assert len(places) == tokens.word_of.count(word)
    few = replace(held_out, keys=held_out.keys[:3], captions=held_out.captions[:3], tokens=held_out.tokens[:6])
    part = filling.mask_captions(few, MaskingConfig(), tokenizer)
    assert (part.rows, part.positions) == (masked.rows[:6], masked.positions[:6])
    for ids in ([1, 2], [1, 1, 2, 2], [5, 4, 3, 2, 1], [1, 1, 2, 3, 4], [1, 1, 1, 2], [3, 1, 3, 2, 3, 9]):
        image_id = torch.tensor(ids)
        other = filling.mismatched_images(image_id)
        assert (image_id[other] != image_id).all()
        if 2 * max(ids.count(i) for i in ids) <= len(ids):
            assert sorted(other.tolist()) == list(range(len(ids)))
    with pytest.raises(ValueError, match="no other image"):
        filling.mismatched_images(torch.tensor([4, 4, 4]))


def test_predictions_equal_those_of_one_caption_at_a_time(model, held_out, tokenizer):
    masked, predictor = filling.mask_captions(held_out, MaskingConfig(), tokenizer), Predictor(model, tokenizer, 7)
    batched = filling.predict_masked_tokens(predictor, masked, held_out, held_out.caption_of)
    single = []
    for row, positions, image in zip(masked.rows, masked.positions, held_out.caption_of, strict=True):
        text, mask = torch.tensor([row]), torch.tensor([positions])
        one = ForwardInput(heads=("mlm",), image=held_out.images[image][None], text=text, mask_positions=mask)
        with torch.no_grad():
            single.append(model.eval()({"x": one})["x"]["mlm"][0].softmax(-1))
    expected, truth = torch.cat(single), torch.tensor([token for labels in masked.labels for token in labels])
    of_truth = expected.gather(1, truth[:, None])[:, 0]
    torch.testing.assert_close(batched.truth_probability, of_truth, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(batched.probabilities, expected.topk(3).values, atol=1e-6, rtol=1e-4)
    assert batched.accuracy == pytest.approx((batched.tokens[:, 0] == truth).float().mean().item())
    model.train()
    assert 0.0 <= filling.predict_masked_tokens(predictor, masked).accuracy <= 1.0
    assert model.training, "the mode is kept"
    model.eval()


class Known(nn.Module):
    """Model whose outputs are known: `outputs(one)` of its only forward."""

    def __init__(self, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        vars(self).update(attributes)

    def forward(self, forwards):
        (one,) = forwards.values()
        return {"only": self.outputs(one)}


class Knowing(Known):
    """Model that predicts exactly the targets of the loss; `decoded`: reads only visible patches."""

    def outputs(self, one):
        assert one.heads == (("decoded_image",) if self.decoded else ("mim",))
        if self.decoded:
            both = torch.cat([one.visible_patches, one.patch_positions], dim=1).sort(dim=1).values
            assert torch.equal(both, torch.arange(16).expand(len(both), -1))
        target = patch_targets(one.image, one.patch_positions, 8, self.target)
        return {"mim": target if self.target == "pixels" else F.one_hot(target, 512).float()}


def test_only_masked_patches_change_follow_the_key_alone_and_true_predictions_restore_them(held_out, model, config):
    autoencoder = ImageDecoderConfig(layers=1, width=16, heads=1)
    predicted = [("pixels", None, 0.005), ("pixels", autoencoder, 0.005), ("mean_colour", None, 16.5 / 255)]
    for target, decoder, error in predicted:  # mean colours are predicted within half a class
        stage = config.stages[0].model_copy(update={"image_target": target, "image_decoder": decoder})
        knowing = Knowing(target=target, decoded=decoder is not None)
        result = filling.reconstruct_images(knowing, held_out, stage, config)
        assert (result.error <= error, result.error < result.error_without_model) == (True, True)
        if target == "pixels":
            assert (result.filled.int() - held_out.images[:].int()).abs().max() <= 1
    for fraction in (0.25, 0.5):
        masking = config.stages[0].masking.model_copy(update={"image_mask_ratio": fraction})
        stage = config.stages[0].model_copy(update={"image_target": "pixels", "masking": masking})
        whole = filling.reconstruct_images(model, held_out, stage, config)
        before, masked, after = (patchify(image, 8) for image in (whole.original, whole.masked, whole.filled))
        is_masked = (masked == 128).all(dim=-1)
        assert (is_masked.sum(dim=1) == round(fraction * 16)).all()
        assert all(torch.equal(before[~is_masked], shown[~is_masked]) for shown in (after, masked))
        few = replace(held_out, images=held_out.images[3:5], keys=held_out.keys[3:5])
        assert torch.equal(filling.reconstruct_images(model, few, stage, config).masked, whole.masked[3:5])


KEYS = {"questions": ("vqa", {"num_answers": 6}), "labelled": ("classification", {"num_classes": 4})}
KEYS |= {"statements": ("nlvr2", {})}
HEADS = {"answers": 6, "classes": 4}  # outputs
PROMPTS = ("a photo of a {}.", "the {} thing")


class Colourist(Known):
    """Model that answers with the colour of an image, or with the next colour if `wrong`."""

    wrong, rows = False, 0

    def outputs(self, one):
        (head,) = one.heads
        self.rows += len(one.image)
        if head == "nlvr2":  # true where the first image is redder than the second
            first, second = (image.float().mean(dim=(1, 2)) for image in (one.image, one.second_image))
            redder = first[:, 0] - first[:, 2] > second[:, 0] - second[:, 2]
            return {head: F.one_hot(redder.long() ^ self.wrong, 2).float()}
        return {head: F.one_hot((colour_of(one.image) + self.wrong) % 4, HEADS[head]).float()}


class ColourSpace(Known):
    """Model that embeds images and texts by the colour they show or name, with an offset for each text."""

    def outputs(self, one):
        if one.text is None:
            colour = F.one_hot(colour_of(one.image), 4).float()
            return {"tokens": colour[:, None].expand(-1, 5, -1), "itc": colour}
        named = torch.stack([(one.text == number).any(dim=1) for number in self.ids], dim=1).float()
        noise = 0.1 * (one.text.sum(dim=1, keepdim=True) % 7)
        return {"itc": F.normalize(named + noise, dim=1)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a function that gives the run fine-tuned on a source type, its tokenizer, and its drawn test data."""
    drawn = tmp_path_factory.mktemp("drawn")
    for source_type, (count, seed) in itertools.product(KEYS, ((200, 0), (60, 1))):
        write_set(drawn, source_type, count, seed=seed)

    def prepared(source_type, limit=None, **keys):
        objective, required = KEYS[source_type]
        config = run_config(drawn, source_type, objective, 1, **(required | keys))
        tokenizer = Tokenizer.train([*iter_captions(Storage(), config.sources["test"].shards), "x"], 200)
        return config, tokenizer, LabelledEvalSet(config, Storage(), "test", config.stages[0], tokenizer, limit)

    return prepared


def test_accuracies_of_right_and_wrong_models(prepared):
    """For NLVR2, the colourist predicts "true" where the first image is red: correct half of the time."""
    for limit in (None, 7):
        config, _, source = prepared("questions", limit)
        listed = choices_of(config, config.stages[:1], Storage())[ANSWERS]
        right = labelled.evaluate_vqa(model := Colourist(), source, listed)
        wrong = labelled.evaluate_vqa(Colourist(wrong=True), source, listed)
        assert (right["accuracy"], right["questions"], model.rows) == (1.0, limit or 60, limit or 60)
        assert (wrong["accuracy"], 0.25 <= wrong["accuracy_without_model"] < 0.6) == (0.0, True)  # four colours
    classified, statements = prepared("labelled")[2], prepared("statements")[2]
    right, wrong = (labelled.evaluate_classification(Colourist(wrong=wrong), classified) for wrong in (False, True))
    assert (right, wrong["top1"]) == ({"images": 60, "top1": 1.0, "top5": 1.0, "chance": 0.25}, 0.0)
    result, inverted = (labelled.evaluate_nlvr2(Colourist(wrong=wrong), statements) for wrong in (False, True))
    assert (result["statements"], 0.25 < result["accuracy"] < 0.75) == (60, True)
    assert result["accuracy"] + inverted["accuracy"] == pytest.approx(1.0)
    assert result["accuracy_without_model"] >= 0.5
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "test-1-0-0"]
    judgements = (ids, [1, 1, 1, 1], 1.0), (ids, [1, 0, 1, 1], 2 / 3), ([*ids, "a"], 5 * [1], None)
    for names, predicted, expected in judgements:
        judged = [(best, Annotation(label=1, id=name)) for best, name in zip(predicted, names, strict=True)]
        source = SimpleNamespace(map_batches=lambda head, compute, judged=judged: judged)
        assert labelled.evaluate_nlvr2(None, source)["consistency"] == expected


def test_trap_09_evaluation_reports_the_stages_objective_bad_samples_and_whether_it_trained_on_the_data(prepared):
    for source_type, metric in (("questions", "accuracy"), ("labelled", "top1")):
        config, tokenizer, _ = prepared(source_type)
        objective, result = KEYS[source_type][0], evaluate(Colourist(), tokenizer, config, Storage())
        values = result.to_json()
        assert (values["pairs"], values["retrieval"], values["mlm"]) == (0, None, None)
        assert values[objective][metric] == result.metrics()[f"eval/test/{objective}_{metric}"] == 1.0
    config, tokenizer, _ = prepared("questions")
    assert evaluate(Colourist(), tokenizer, config, Storage()).trained_on == ()
    assert evaluate(Colourist(), tokenizer, config, Storage(), "train").to_json()["trained_on"] == ["finetune"]
    rotated = {ANSWERS: Choices((*COLOURS[1:], COLOURS[0], "yes", "no"))}
    assert evaluate(Colourist(), tokenizer, config, Storage(), choices=rotated).sections["vqa"]["accuracy"] == 0.0
    config.sources["other"] = prepared("labelled")[0].sources["test"]
    with pytest.raises(ConfigError, match="of type labelled, and stage finetune trains no objective"):
        evaluate(Colourist(), tokenizer, config, Storage(), "other")
    _, _, source = prepared("labelled", num_classes=2)  # half of the colours are not classes here
    with pytest.raises(DataError, match=r"(\d+) of 60 samples are bad: .*its class is"):
        source.map_batches("classes", lambda batch, labels: labels)
    assert 0 < source.skipped.total() < 60


def test_zero_shot_classifies_by_the_means_of_the_class_names_prompts(prepared, monkeypatch):
    config = prepared("labelled")[0]
    tokenizer = Tokenizer.train([*COLOURS, "a photo of the thing."] * 5, 200)
    model = ColourSpace(ids=[tokenizer.encode(name, 8).ids[1] for name in COLOURS])
    rows = labelled.embed_classes(Predictor(model, tokenizer, 3), COLOURS, PROMPTS, 16)
    for row, name in zip(rows, COLOURS, strict=True):
        ids = [torch.tensor([tokenizer.encode(prompt.replace("{}", name), 16).ids]) for prompt in PROMPTS]
        vectors = [model({"x": ForwardInput(heads=("itc",), text=text)})["only"]["itc"][0] for text in ids]
        torch.testing.assert_close(row, F.normalize(torch.stack(vectors).mean(dim=0), dim=0), atol=1e-6, rtol=1e-5)
    by_name = [["openai_imagenet"], [*prompt_ensembles()["openai_imagenet"]]]
    rows, spelled_out = (labelled.embed_classes(Predictor(model, tokenizer, 64), COLOURS, p, 16) for p in by_name)
    torch.testing.assert_close(rows, spelled_out, atol=0, rtol=0)
    stage = config.stages[0].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    section = config.evaluation.model_copy(update={"prompts": PROMPTS})
    config = config.model_copy(update={"stages": (stage,), "evaluation": section})
    result = evaluate(model, tokenizer, config, Storage(), probe="train")
    values = result.to_json()
    assert values["zero_shot"] == {"images": 60, "top1": 1.0, "top5": 1.0, "chance": 0.25}
    assert (values["linear_probe"]["top1"], values["linear_probe"]["trained_on"]) == (1.0, 200)
    assert values["classification"] is None
    assert {"eval/test/zero_shot_top1", "eval/test/linear_probe_top1"} <= result.metrics().keys()
    monkeypatch.setattr(labelled, "CLASSES", "absent.json")
    with pytest.raises(ConfigError, match=r"labelled-1/absent\.json with its class names is missing"):
        evaluate(model, tokenizer, config, Storage())
    values = config.model_dump(mode="json")
    values["evaluation"]["prompts"] = ["a photo"]
    with pytest.raises(ConfigError, match=r"evaluation.prompts.*must contain \{\} exactly once"):
        validate(values, "tiny")


def test_the_probe_is_where_the_gradient_of_its_loss_derived_by_hand_is_zero():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)), random.integers(0, 3, 80)
    weight, bias = (part.numpy() for part in labelled.fit_linear_probe(torch.tensor(x), torch.tensor(y), 3, 0.01))
    odds = np.exp(x @ weight + bias)
    errors = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[y]
    gradients = [x.T @ errors / 80 + 0.01 * weight, errors.mean(axis=0)]
    assert max(np.abs(gradient).max() for gradient in gradients) < 1e-5 < 0.1 < np.abs(weight).max()
