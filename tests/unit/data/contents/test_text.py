"""The WordPiece tokenizer and the training of vocabularies."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers.normalizers import BertNormalizer

from pipeline.config.errors import DataError
from pipeline.data.contents.text import SPECIALS, Tokenizer, choose_alphabet
from pipeline.data.storage import Storage

SHARED = Path(__file__).resolve().parents[4] / ".." / "shared"
CAPTIONS = [
    "A large red circle to the left of a small blue square.",
    "Two dogs — one black, one brown — are playing catch; it's snowing!",
    "Un café très élégant près de l'église",
    "playing played player play replay",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS * 20, size=160)


def test_texts_are_framed_and_words_numbered(tokenizer):
    tokens = tokenizer.encode("A red playground", max_length=40)
    assert tokens.ids[0] == tokenizer.cls_id
    assert tokens.ids[-1] == tokenizer.sep_id
    assert tokens.word_of[0] == tokens.word_of[-1] == -1
    real = tokens.word_of[1:-1]
    assert real == sorted(real)
    assert set(real) == {0, 1, 2}
    assert len(tokens.ids) == len(tokens.word_of) > 5  # 'playground' was never seen, so it takes several tokens


def test_long_texts_are_truncated_with_their_frame(tokenizer):
    whole, cut = (tokenizer.encode(CAPTIONS[0], length) for length in (100, 7))
    assert len(cut.ids) == 7
    assert cut.ids[-1] == tokenizer.sep_id
    assert cut.ids[:-1] == whole.ids[:6]
    assert cut.word_of[:-1] == whole.word_of[:6]


def test_batched_and_single_encoding_agree(tokenizer):
    texts = [*CAPTIONS, "  "]
    assert tokenizer.encode_batch(texts, 12) == [tokenizer.encode(text, 12) for text in texts]
    assert tokenizer.encode("  ", 12).ids == [tokenizer.cls_id, tokenizer.sep_id]


def test_captions_cannot_spell_special_tokens(tokenizer):
    specials = {tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
    assert not specials & set(tokenizer.encode("a [MASK] on the [CLS] [PAD] [SEP]", 40).ids[1:-1])


def test_case_and_accents_do_not_matter(tokenizer):
    assert tokenizer.encode("CAFÉ élégant", 40) == tokenizer.encode("cafe elegant", 40)


def test_decoding_returns_the_words_and_shows_masks(tokenizer):
    ids = tokenizer.encode("a large red circle", 40).ids
    assert tokenizer.decode(ids) == "a large red circle"
    ids[3] = tokenizer.mask_id
    assert tokenizer.decode([*ids, tokenizer.pad_id]) == "a large [MASK] circle"


def test_trained_vocabularies_start_with_specials_and_keep_size(tokenizer):
    assert tokenizer.tokens[:5] == SPECIALS
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id) == (0, 1, 2)
    assert (tokenizer.sep_id, tokenizer.mask_id) == (3, 4)
    assert tokenizer.size <= 160
    assert Tokenizer.train(["äöüß" + "".join(map(chr, range(0x3B1, 0x3C9)))], size=20).size <= 20


def test_vocabulary_training_is_deterministic():
    code = (
        "import json, sys; from pipeline.data.contents.text import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin) * 20, 160).digest)"
    )
    root = Path(__file__).resolve().parents[4]
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], input=json.dumps(CAPTIONS), capture_output=True, text=True, check=True, cwd=root
    ).stdout.strip()
    assert run() == run() == Tokenizer.train(CAPTIONS * 20, 160).digest


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer, tmp_path):
    url = str(tmp_path / "vocab.txt")
    Storage().write(url, tokenizer.vocabulary_file)
    for copy in (Tokenizer.load(Storage(), url), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        assert (copy.digest, copy.tokens) == (tokenizer.digest, tokenizer.tokens)
        assert copy.encode(CAPTIONS[1], 40) == tokenizer.encode(CAPTIONS[1], 40)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a\nb\n", "does not contain [PAD]"),
        ("\n".join(SPECIALS) + "\nred\nred\n", "'red' more than once"),
        ("", "does not contain [PAD]"),
    ],
)
def test_malformed_vocabularies_are_rejected_by_name(tmp_path, content, told):
    file = tmp_path / "vocab.txt"
    file.write_text(content)
    with pytest.raises(DataError, match=r"vocab\.txt") as error:
        Tokenizer.load(Storage(), str(file))
    assert told in str(error.value)


def test_training_without_captions_is_rejected():
    with pytest.raises(DataError, match="no caption"):
        Tokenizer.train(["", "  "], 100)


def test_random_ids_can_be_any_ordinary_token(tokenizer):
    assert set(tokenizer.ordinary_ids) == set(range(5, tokenizer.size))


def test_published_vocabulary_encodes_as_transformers_does():
    vocabulary = SHARED / "data" / "bert_vocab" / "vocab.txt"
    captions_file = SHARED / "data" / "flickr8k_3k" / "val.jsonl"
    if not vocabulary.exists() or not captions_file.exists():
        pytest.skip("../shared/data holds no bert_vocab and flickr8k_3k")
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(Storage(), str(vocabulary))
    ids = {token: i for i, token in enumerate(ours.tokens)}
    theirs = transformers.BertTokenizer(vocab=ids, do_lower_case=True)
    captions = [c for line in captions_file.read_text().splitlines()[:100] for c in json.loads(line)["captions"]]
    expected = theirs(captions + CAPTIONS, max_length=20, truncation=True)["input_ids"]
    assert len(expected) > 400
    assert [tokens.ids for tokens in ours.encode_batch(captions + CAPTIONS, 20)] == expected
    assert not any(ours.tokens[i].startswith("[unused") for i in ours.ordinary_ids)


@pytest.mark.parametrize("text", ["caf\udce9", "nice \ud83d", "\ude00\ud83d"])
def test_invalid_unicode_is_a_data_error(text: str) -> None:
    tokenizer = Tokenizer.train(["a cat"], 64)
    with pytest.raises(DataError, match="is not valid Unicode"):
        tokenizer.encode(text, 8)
    with pytest.raises(DataError, match="is not valid Unicode"):
        tokenizer.encode_batch(["fine", text], 8)


def written(tmp_path: Path, content: bytes, config: str | None = None) -> str:
    (tmp_path / "vocab.txt").write_bytes(content)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    return str(tmp_path / "vocab.txt")


@pytest.mark.parametrize("content", ["\ufeff{}", "{}\n", "{}\n\n", "{}\r\n\r\n", "\ufeff{}\n\n\n"])
def test_byte_order_mark_and_blank_last_lines_are_ignored(tmp_path: Path, content: str) -> None:
    tokens = [*SPECIALS, "red", "##s"]
    url = written(tmp_path, content.format("\n".join(tokens)).encode())
    assert Tokenizer.load(Storage(), url).tokens == tuple(tokens)
    assert Tokenizer.load(Storage(), url).digest == Tokenizer(tokens).digest


CASED = [*SPECIALS, "the", "Rome", "rome", "é", "e", "RED"]


def test_cased_vocabulary_keeps_capitals_and_accents(tmp_path: Path) -> None:
    cased, lower = Tokenizer(CASED), Tokenizer(CASED, lowercase=True)
    words = [[t.tokens[i] for i in t.encode("the Rome RED é", 9).ids[1:-1]] for t in (cased, lower)]
    assert words == [["the", "Rome", "RED", "é"], ["the", "rome", "[UNK]", "e"]]
    assert cased.digest != lower.digest
    assert pickle.loads(pickle.dumps(lower)).encode("Rome", 9) == lower.encode("Rome", 9)  # noqa: S301
    url = written(tmp_path, "\n".join(CASED).encode())
    assert Tokenizer.load(Storage(), url).digest == cased.digest
    assert Tokenizer.load(Storage(), url, lowercase=True).digest == lower.digest


def test_reserved_tokens_do_not_make_a_vocabulary_cased() -> None:
    assert Tokenizer([*SPECIALS, "[unused0]", "[START A]", "red"]).lowercase


@pytest.mark.parametrize("stated", [True, False])
def test_case_follows_hugging_faces_tokenizer_config(tmp_path: Path, stated: bool) -> None:
    url = written(tmp_path, "\n".join(CASED).encode(), json.dumps({"do_lower_case": stated}))
    assert Tokenizer.load(Storage(), url).lowercase is stated
    assert Tokenizer.load(Storage(), url, lowercase=not stated).lowercase is not stated


@pytest.mark.parametrize("config", ["[]", "{", "[" * 20_000, '"x"'])
def test_damaged_tokenizer_config_is_a_data_error(tmp_path: Path, config: str) -> None:
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        Tokenizer.load(Storage(), written(tmp_path, "\n".join(CASED).encode(), config))


def chinese(count: int) -> list[str]:
    """Return captions with `count` different Chinese characters, the first ones most frequent."""
    characters = [chr(0x4E00 + n) for n in range(count)]
    return ["".join(characters[first : first + 20]) for first in range(0, count, 20)] + ["".join(characters[:100])] * 9


def test_alphabet_grows_with_the_size_of_the_vocabulary() -> None:
    captions = chinese(3500)
    whole, small = Tokenizer.train(captions, 30522), Tokenizer.train(captions, 2000)
    assert whole.unknown_share(captions) == 0
    assert not [token for token in whole.tokens if token.startswith("##")]
    assert small.size == 2000
    assert 0.2 < small.unknown_share(captions) < 0.5
    assert {chr(0x4E00 + n) for n in range(100)} <= set(small.tokens)


def test_rare_characters_beyond_a_thousand_are_dropped() -> None:
    for frequent, kept in ((10_000_000, 1100), (2, 1200)):
        counts = Counter({chr(0x4E00 + n): frequent if n < 1100 else 2 for n in range(1200)})
        assert len(choose_alphabet(counts, 30_000, BertNormalizer())) == kept


@pytest.mark.parametrize("character", ["w", "😀"])
def test_overlong_words_are_dropped_from_training(character: str) -> None:
    captions = ["a red cat, a blue dog", "x" * 100]
    whole = Tokenizer.train(captions, 200)
    long = character * 1_000_000  # took hours when merges were learned from them
    assert Tokenizer.train([f"{captions[0]} {long}", captions[1]], 200).tokens == whole.tokens
    assert whole.encode("x" * 101, 9).ids[1:-1] == [whole.unk_id]
    assert whole.unk_id not in whole.encode("x" * 100, 9).ids
    assert "word" in Tokenizer.train(["/".join(["word"] * 60)], 200).tokens


def test_cased_vocabulary_can_be_trained() -> None:
    assert not Tokenizer.train(["Rome is Rome"] * 9, 64, lowercase=False).lowercase
    assert "R" in Tokenizer.train(["Rome is Rome"] * 9, 64, lowercase=False).tokens


def test_unknown_share_is_a_fraction_of_all_tokens() -> None:
    tokenizer = Tokenizer([*SPECIALS, "a", "cat"])
    assert tokenizer.unknown_share(["a cat", "a dog", ""]) == 0.25
    assert tokenizer.unknown_share([]) == tokenizer.unknown_share([" "]) == 0
