"""Synthetic scenes: captions are true, complete and unique; evaluation scenes are never trained on."""

import json
import re

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import SourceConfig, SyntheticConfig
from pipeline.data.building import scenes
from pipeline.data.building.scenes import SHAPES, Description, Thing, build_synthetic, draw_descriptions
from pipeline.data.contents.images import decode
from pipeline.data.randomness import CounterRandom
from pipeline.data.reading.samples import iter_samples
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage

THING = f"a (?:large|small) (?:{'|'.join(scenes.COLOURS)}) (?:{'|'.join(SHAPES)})"


def source(folder, name: str, source_type: str = "pairs", **options) -> SourceConfig:
    synthetic = SyntheticConfig(**{"scenes": 30, "image_size": 16, **options})
    return SourceConfig(shards=str(folder / name), type=source_type, synthetic=synthetic)


def read_back(caption: str) -> tuple[set, set]:
    """Return the (things, relations) that a caption states, parsed independently of the grammar's code."""
    relations, place = set(), "(on the left|on the right|at the top|at the bottom)"
    for match in re.finditer(f"({THING}) (?:to the )?(left of|right of|above|over|below|under) ({THING})", caption):
        one, word, other = match.groups()
        pair = (one, other) if word in ("left of", "above", "over") else (other, one)
        relations.add(("x" if word in ("left of", "right of") else "y", *pair))
    for match in re.finditer(f"({THING}) {place}", caption):
        relations.add(("place", match[1], match[2].split()[-1]))
    for match in re.finditer(f"{place} ({THING})", caption):
        if not re.search(f"{THING} $", caption[: match.start()]):
            relations.add(("place", match[2], match[1].split()[-1]))
    return set(re.findall(THING, caption)), relations


def test_sequence_and_drawing_depend_on_the_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (list(draw_descriptions(SyntheticConfig(scenes=n, seed=1, distinct=True))) for n in (50, 80))
    other = list(draw_descriptions(SyntheticConfig(scenes=50, seed=2, distinct=True)))
    assert many[:50] == few != other  # more scenes extend the same sequence
    monkeypatch.setattr(scenes, "draw_descriptions", lambda config, excluded: iter([few[0]]))
    one, same, other = (next(scenes.scene_samples(SyntheticConfig(scenes=1, seed=seed), "pairs")) for seed in (5, 5, 6))
    assert (one == same, one["json"] == other["json"], one["jpg"] == other["jpg"]) == (True, False, False)


def test_captions_are_complete_true_and_of_one_description() -> None:
    described: dict[str, Description] = {}
    for number, description in enumerate(draw_descriptions(SyntheticConfig(scenes=3000, distinct=True))):
        captions = scenes.write_captions(description, 99, CounterRandom(number))
        assert len(captions) == len(set(captions)) >= 12
        for caption in captions:
            assert described.setdefault(caption, description) == description
        if number >= 300:
            continue
        axis, start, end = ("x", "left", "right") if description.horizontal else ("y", "top", "bottom")
        first, second, *others = map(str, description.things)
        true = {(axis, first, second), ("place", first, start), ("place", second, end)}
        if description.side is not None:
            opposite = scenes.OPPOSITE[description.side]
            true = {(axis, first, second), ("place", others[0], description.side)}
            true |= {("place", first, opposite), ("place", second, opposite)}
        for caption in captions:
            things, relations = read_back(caption)
            assert things == set(map(str, description.things)), caption
            assert set() < relations <= true, caption
    assert len(set(described.values())) == 3000


def test_all_shapes_colours_sizes_axes_and_counts_occur_and_are_drawn() -> None:
    drawn = list(draw_descriptions(SyntheticConfig(scenes=500)))
    _, colours, shapes = (set(values) for values in zip(*(t for d in drawn for t in d.things), strict=True))
    assert (shapes, colours, {d.horizontal for d in drawn}) == (set(SHAPES), set(scenes.COLOURS), {True, False})
    sides = {(d.side, len(d.things)) for d in drawn}
    assert sides == {(None, 2), ("top", 3), ("bottom", 3), ("left", 3), ("right", 3)}
    assert all(len(set(d.things)) == len(d.things) for d in drawn)
    for seed in range(40):
        first, second = Thing("large", "red", SHAPES[seed % 6]), Thing("small", "blue", SHAPES[seed // 6 % 6])
        description = Description((first, second), horizontal=seed % 2 == 0)
        image = scenes.draw_image(description, 64, CounterRandom(seed)).astype(int)
        red = np.argwhere((image[..., 0] > 150) & (image[..., 1] < 90) & (image[..., 2] < 90))
        blue = np.argwhere((image[..., 2] > 150) & (image[..., 0] < 110) & (image[..., 1] < 110))
        assert len(red) > 1.8 * len(blue) > 0
        distance = blue.mean(axis=0) - red.mean(axis=0)
        along, across = (distance[1], distance[0]) if description.horizontal else (distance[0], distance[1])
        assert along > max(20, abs(across))
        assert 0 < red.mean() < 63


def test_sources_are_built_for_every_type(tmp_path) -> None:
    sources = {"other": SourceConfig(shards=str(tmp_path / "other")), "pairs": source(tmp_path, "pairs", scenes=450)}
    sources |= {kind: source(tmp_path, kind, kind, seed=seed) for seed, kind in ((2, "text"), (3, "images"))}
    sources["unseen"] = source(tmp_path, "unseen", seed=4, distinct=True, exclude="pairs")
    build_synthetic(Storage(), sources)
    assert ((tmp_path / "other").exists(), len([*(tmp_path / "pairs").glob("*.tar")])) == (False, 3)
    expected = {"pairs": [("jpg", "json")] * 450, "text": [("txt",)] * 90, "images": [("jpg",)] * 30}
    expected |= {"unseen": [("jpg", "json")] * 30}
    built = {name: [s.members for s in iter_samples(Storage(), sources[name].shards)] for name in expected}
    assert {name: [tuple(members) for members in samples] for name, samples in built.items()} == expected
    assert decode(built["pairs"][7]["jpg"], 10_000).shape == (16, 16, 3)
    pairs, unseen = ([json.loads(members["json"]) for members in built[name]] for name in ("pairs", "unseen"))
    assert all(len(record["captions"]) == 3 and 0 <= record["image_id"] < 1 << 63 for record in pairs)
    trained = {record["image_id"] for record in pairs}
    assert len({record["image_id"] for record in unseen} - trained) == 30  # excluded scenes are never drawn


def test_excluded_scenes_are_never_drawn_and_equal_ones_have_equal_ids() -> None:
    config = SyntheticConfig(scenes=400, seed=3)
    excluded = frozenset(draw_descriptions(SyntheticConfig(scenes=200, seed=3)))
    assert [excluded.isdisjoint(draw_descriptions(config, omitted)) for omitted in ((), excluded)] == [False, True]
    ids: dict[int, set[Description]] = {}
    config = SyntheticConfig(scenes=2000, image_size=8, captions=1)
    produced = (scenes.scene_samples(config, kind) for kind in ("pairs", "text"))
    for description, pair, text in zip(draw_descriptions(config), *produced, strict=True):
        record, true = json.loads(pair["json"]), set(scenes.write_captions(description, 99, CounterRandom(0)))
        assert {*record["captions"], text["txt"].decode()} <= true
        ids.setdefault(record["image_id"], set()).add(description)
    assert {len(descriptions) for descriptions in ids.values()} == {1}
    assert len(set.union(*ids.values())) == len(ids) < 2000


def test_building_is_idempotent_restarts_and_rejects_foreign_folders_and_exclusions(tmp_path) -> None:
    one, other = source(tmp_path, "one"), source(tmp_path, "other")
    build_synthetic(Storage(), {"one": one})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    build_synthetic(Storage(), {"one": one, "other": other})
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    assert load_manifest(Storage(), one.shards).digest == load_manifest(Storage(), other.shards).digest
    (tmp_path / "other" / "manifest.json").unlink()  # as an interrupted run leaves it
    (tmp_path / "other" / "000000.tar").write_bytes(b"half a shard")
    (tmp_path / "other" / "000001.tar").write_bytes(b"of another configuration")
    build_synthetic(Storage(), {"other": other})
    assert load_manifest(Storage(), one.shards).digest == load_manifest(Storage(), other.shards).digest
    (tmp_path / "mine").mkdir()  # with tars that are not scenes
    (tmp_path / "mine" / "000000.tar").write_bytes(b"precious")
    unknown = "'nothing' is not a synthetic source; expected one of: scenes"
    for sources, error, reason in (
        ({"one": {"image_size": 24}}, DataError, "'one'.*another configuration"),
        ({"mine": {}}, DataError, "mome shards index"),
        ({"scenes": {"exclude": "nothing"}}, ConfigError, unknown),
        ({"a": {"exclude": "b"}, "b": {"exclude": "a"}}, ConfigError, "excludes itself"),
    ):
        with pytest.raises(error, match=reason):
            build_synthetic(Storage(), {name: source(tmp_path, name, **options) for name, options in sources.items()})
    assert (tmp_path / "mine" / "000000.tar").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other", "mine"}
