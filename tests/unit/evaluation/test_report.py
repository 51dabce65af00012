"""The page is self-contained, escapes its contents, marks correct answers, and stays small."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.explain import alignment_examples
from pipeline.evaluation.report import build_report_data, render_report
from pipeline.evaluation.retrieval import rankings
from pipeline.pages.charts import percent
from pipeline.pages.page import thumbnail

CURVES = {"vision": [(step, 2.0 / (step + 1)) for step in range(50)], "language": []}
VOID = {"meta", "link", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Parser that collects tags, addresses and text, and checks that tags are closed in the correct order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:  # <line/>
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def render(config, tokenizer):
    """Return a function that renders the page of an evaluation."""

    def render(evaluation, curves=CURVES):
        return render_report(build_report_data(evaluation, config, tokenizer), config, curves)

    return render


def test_page_is_self_contained_escaped_and_shows_metrics_with_chance(evaluation, render):
    page, retrieval = render(replace(evaluation, checkpoint="s3://bucket/run")), evaluation.retrieval
    parsed = Page(page)
    assert parsed.tags.count("img") > 30
    assert not parsed.open
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert not re.search(r"<script|@import|url\(|https?://", page)
    assert len(page) < 5_000_000
    chance = f"chance {percent(retrieval.text_to_image.chance['r10'])}"
    accuracy = percent(evaluation.sections["mlm"]["accuracy"])
    shown = [percent(retrieval.image_to_text.values["r10"]), chance, accuracy]
    assert all(text in parsed.text for text in (*shown, "s3://bucket/run", "vision_language"))
    held_out = evaluation.held_out
    captions = tuple(("<script>alert('caption')</script>",) * len(own) for own in held_out.captions)
    page = render(replace(evaluation, held_out=replace(held_out, captions=captions)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_perfect_model_has_correct_answers_first_and_partial_evaluations_a_page(
    evaluation, model, config, storage, tokenizer, render
):
    held_out = evaluation.held_out
    perfect = (torch.arange(len(held_out))[:, None] == held_out.caption_of[None]).float()
    ranked = rankings(perfect.__getitem__, perfect.T.__getitem__, held_out.caption_of, held_out.image_id)
    text = Page(render(replace(evaluation, rankings=ranked))).text
    assert text.count("found first") == 16
    assert "at place" not in text
    for stage, limit in (("vision", 1), ("vision", 6), ("language", 6), ("vision_language", 1)):
        text = Page(render(evaluate(model, tokenizer, config, storage, stage=stage, limit=limit))).text
        assert f"{limit} held-out images" in text
        assert ("R@1" in text) == (stage == "vision_language")


def test_images_are_reduced_and_small_percentages_keep_two_decimals():
    torch.manual_seed(0)
    assert len(thumbnail(torch.randint(0, 256, (640, 640, 3), dtype=torch.uint8))) < 40_000
    assert thumbnail(torch.zeros(48, 48, 3, dtype=torch.uint8)).startswith("data:image/png")
    texts = [percent(fraction) for fraction in (0.0, 0.005, 0.125, 1.0, None)]
    assert " ".join(texts).replace("\N{NO-BREAK SPACE}", "") == "0.0% 0.50% 12.5% 100.0% –"


def test_alignments_are_shown_and_comparisons_mark_different_data(model, evaluation, config, tokenizer):
    alignments = alignment_examples(model, tokenizer, evaluation.held_out, config, config.stages[-1])
    captions = [evaluation.held_out.captions[number][0] for number in range(0, 24, 6)]
    assert [card.caption for card in alignments.captions] == captions
    assert [word for word, _, _ in alignments.captions[0].words] == captions[0].split()
    assert all(0 < fraction <= 1 for card in alignments.captions for _, _, fraction in card.words)
    data = build_report_data(evaluation, config, tokenizer, alignments)
    page = render_report(data, config, {})
    assert "No stage trained wpa" in page
    assert page.count('alt="heat map of') == sum(len(card.words) for card in alignments.captions)
    data = replace(data, metrics={"i2t_r1": 0.5, "pairs": 24.0, "mlm_accuracy": 0.25})
    other = replace(data, run="other", metrics={"i2t_r1": 2.0, "pairs": 24.0})
    page = render_report(data, config, {}, other)
    assert '<tr><th scope="row">i2t_r1</th><td>0.5</td><td>2</td><td>-1.5</td></tr>' in page
    assert not any(text in page for text in (">pairs<", "cannot be compared"))
    different = replace(other, key=replace(data.key, digest="another"))
    assert "cannot be compared" in render_report(data, config, {}, different)
