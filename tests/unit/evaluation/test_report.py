"""The page is self-contained, escapes its contents, marks correct answers, and stays small."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.explain import alignment_examples
from pipeline.evaluation.report import build_report_data, metric_differences, percent, render_report, thumbnail
from pipeline.evaluation.results import Evaluation
from pipeline.evaluation.retrieval import rankings
from pipeline.models.vlmo import VLMo

PAIRS = 24  # in the source
CURVES = {"vision": [(step, 2.0 / (step + 1)) for step in range(50)], "language": []}
VOID = {"meta", "link", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Parser that collects addresses and text, and checks that tags are closed in the correct order."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.pictures = 0
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.pictures += tag == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def found(model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer) -> Evaluation:
    return evaluate(model, tokenizer, config, storage, others={"vision": model, "language": model})


@pytest.fixture(scope="module")
def page(found: Evaluation, config: RunConfig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    _write(found.located("s3://bucket/run", str(path)), config, tokenizer, path, CURVES)
    return path.read_text()


def _write(
    found: Evaluation, config: RunConfig, tokenizer: Tokenizer, page: Path, curves: dict[str, Any] | None = None
) -> None:
    page.write_text(render_report(build_report_data(found, config, tokenizer), config, curves or {}), encoding="utf-8")


def test_page_is_self_contained(page: str) -> None:
    parsed = Page(page)
    assert parsed.pictures > 30
    assert not parsed.open
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert not re.search(r"<script|@import|url\(|https?://", page)
    assert len(page) < 5_000_000


def test_page_shows_metrics_with_chance(page: str, found: Evaluation) -> None:
    text = Page(page).text
    assert found.retrieval is not None
    assert found.mlm is not None
    assert found.mlm.own_image is not None
    assert percent(found.retrieval.image_to_text.at[10]) in text
    assert f"chance {percent(found.retrieval.text_to_image.chance[10])}" in text
    assert percent(found.mlm.own_image.accuracy) in text
    assert "s3://bucket/run" in text
    assert "vision_language" in text


def test_captions_are_escaped(found: Evaluation, config: RunConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    attack = "<script>alert('caption')</script>"
    captions = tuple(tuple(attack for _ in each) for each in found.held_out.captions)
    _write(replace(found, held_out=replace(found.held_out, captions=captions)), config, tokenizer, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_perfect_model_has_correct_answers_first(
    found: Evaluation, config: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    held_out = found.held_out
    perfect = (torch.arange(len(held_out))[:, None] == held_out.caption_of[None]).float()
    both = rankings(perfect.__getitem__, perfect.T.__getitem__, held_out.caption_of, held_out.image_id)
    _write(replace(found, rankings=both), config, tokenizer, tmp_path / "r.html")
    text = Page((tmp_path / "r.html").read_text()).text
    assert text.count("found first") == 16
    assert "at place" not in text


@pytest.mark.parametrize("stage", ["vision", "language"])
def test_stages_without_retrieval_have_a_page(
    stage: str, model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for limit in (1, 6):
        part = evaluate(model, tokenizer, config, storage, stage=stage, limit=limit)
        _write(part, config, tokenizer, tmp_path / "r.html", CURVES)
        assert "R@1" not in Page((tmp_path / "r.html").read_text()).text


def test_a_single_pair_has_a_page(
    model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _write(evaluate(model, tokenizer, config, storage, limit=1), config, tokenizer, tmp_path / "r.html")
    assert "1 held-out images" in Page((tmp_path / "r.html").read_text()).text


def test_large_images_are_reduced() -> None:
    torch.manual_seed(0)
    assert len(thumbnail(torch.randint(0, 256, (640, 640, 3), dtype=torch.uint8))) < 40_000
    assert thumbnail(torch.zeros(48, 48, 3, dtype=torch.uint8)).startswith("data:image/png")


def test_small_percentages_keep_two_decimals() -> None:
    assert [percent(each) for each in (0.0, 0.005, 0.125, 1.0, None)] == [
        "0.0\u00a0%",
        "0.50\u00a0%",
        "12.5\u00a0%",
        "100.0\u00a0%",
        "–",
    ]


def test_alignments_are_shown_with_a_note_if_wpa_was_untrained(
    model: VLMo, found: Evaluation, config: RunConfig, tokenizer: Tokenizer
) -> None:
    alignments = alignment_examples(model, tokenizer, found.held_out, config, config.stages[-1])
    captions = [found.held_out.captions[number][0] for number in range(0, PAIRS, PAIRS // 4)]
    assert [each.caption for each in alignments.captions] == captions
    assert [word for word, _, _ in alignments.captions[0].words] == captions[0].split()
    assert all(0 < share <= 1 for each in alignments.captions for _, _, share in each.words)
    page = render_report(build_report_data(found, config, tokenizer, alignments), config, {})
    assert "No stage trained wpa" in page
    assert page.count('alt="heat map of') == sum(len(each.words) for each in alignments.captions)


def test_report_compares_runs_and_marks_different_data(
    found: Evaluation, config: RunConfig, tokenizer: Tokenizer
) -> None:
    shown = build_report_data(found, config, tokenizer)
    other = replace(shown, name="other", metrics={**shown.metrics, "i2t_r1": 2.0})
    assert ("i2t_r1", shown.metrics["i2t_r1"], 2.0, shown.metrics["i2t_r1"] - 2.0) in metric_differences(shown, other)
    assert "cannot be compared" not in render_report(shown, config, {}, other)
    assert "cannot be compared" in render_report(shown, config, {}, replace(other, digest="another"))
