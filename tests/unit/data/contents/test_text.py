"""The tokenizer: BERT's, framed, cut, with its words; vocabularies that are functions of the captions."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.errors import DataError
from pipeline.data.contents.text import SPECIALS, Tokenizer
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


def test_a_text_is_framed_and_its_words_are_numbered(tokenizer):
    tokens = tokenizer.encode("A red playground", max_length=40)
    assert tokens.ids[0] == tokenizer.cls_id
    assert tokens.ids[-1] == tokenizer.sep_id
    assert tokens.word_of[0] == tokens.word_of[-1] == -1
    real = tokens.word_of[1:-1]
    assert real == sorted(real)
    assert set(real) == {0, 1, 2}
    assert len(tokens.ids) == len(tokens.word_of) > 5  # 'playground' was never seen, so it takes several tokens


def test_a_long_text_is_cut_to_the_length_with_its_frame(tokenizer):
    whole, cut = (tokenizer.encode(CAPTIONS[0], length) for length in (100, 7))
    assert len(cut) == 7
    assert cut.ids[-1] == tokenizer.sep_id
    assert cut.ids[:-1] == whole.ids[:6]
    assert cut.word_of[:-1] == whole.word_of[:6]


def test_an_empty_text_is_its_frame(tokenizer):
    assert tokenizer.encode("  ", 40).ids == [tokenizer.cls_id, tokenizer.sep_id]


def test_batched_and_single_encoding_agree(tokenizer):
    assert tokenizer.encode_batch(CAPTIONS, 12) == [tokenizer.encode(text, 12) for text in CAPTIONS]


def test_a_caption_that_spells_a_special_token_holds_none(tokenizer):
    specials = {tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
    assert not specials & set(tokenizer.encode("a [MASK] on the [CLS] [PAD] [SEP]", 40).ids[1:-1])


def test_case_and_accents_do_not_matter(tokenizer):
    assert tokenizer.encode("CAFÉ élégant", 40) == tokenizer.encode("cafe elegant", 40)


def test_decoding_returns_the_words_and_shows_masks(tokenizer):
    ids = tokenizer.encode("a large red circle", 40).ids
    assert tokenizer.decode(ids) == "a large red circle"
    ids[3] = tokenizer.mask_id
    assert tokenizer.decode([*ids, tokenizer.pad_id]) == "a large [MASK] circle"


def test_a_trained_vocabulary_begins_with_the_specials_and_keeps_its_size(tokenizer):
    assert tokenizer.tokens[:5] == SPECIALS
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id) == (0, 1, 2)
    assert (tokenizer.sep_id, tokenizer.mask_id) == (3, 4)
    assert tokenizer.size <= 160
    assert Tokenizer.train(["äöüß" + "".join(map(chr, range(0x3B1, 0x3C9)))], size=20).size <= 20


def test_training_is_the_same_in_every_process():
    code = (
        "import json, sys; from pipeline.data.contents.text import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin) * 20, 160).digest)"
    )
    root = Path(__file__).resolve().parents[4]
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], input=json.dumps(CAPTIONS), capture_output=True, text=True, check=True, cwd=root
    ).stdout.strip()
    assert run() == run() == Tokenizer.train(CAPTIONS * 20, 160).digest


def test_a_saved_vocabulary_loads_as_the_same_tokenizer(tokenizer, tmp_path):
    url = str(tmp_path / "vocab.txt")
    tokenizer.save(Storage(), url)
    loaded = Tokenizer.load(Storage(), url)
    assert loaded.digest == tokenizer.digest
    assert loaded.tokens == tokenizer.tokens


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert copy.digest == tokenizer.digest
    assert copy.encode(CAPTIONS[1], 40) == tokenizer.encode(CAPTIONS[1], 40)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a\nb\n", "lacks [PAD]"),
        ("\n".join(SPECIALS) + "\nred\nred\n", "'red' more than once"),
        ("", "lacks [PAD]"),
    ],
)
def test_what_is_no_vocabulary_is_refused_by_name(tmp_path, content, told):
    file = tmp_path / "vocab.txt"
    file.write_text(content)
    with pytest.raises(DataError, match=r"vocab\.txt") as error:
        Tokenizer.load(Storage(), str(file))
    assert told in str(error.value)


def test_training_on_nothing_says_so():
    with pytest.raises(DataError, match="no caption"):
        Tokenizer.train(["", "  "], 100)


def test_random_ids_can_be_any_ordinary_token(tokenizer):
    assert set(tokenizer.ordinary_ids) == set(range(5, tokenizer.size))


def test_the_published_vocabulary_encodes_as_transformers_does():
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
def test_a_text_that_is_no_unicode_is_a_data_error(text: str) -> None:
    tokenizer = Tokenizer.train(["a cat"], 64)
    with pytest.raises(DataError, match="is not valid Unicode"):
        tokenizer.encode(text, 8)
    with pytest.raises(DataError, match="is not valid Unicode"):
        tokenizer.encode_batch(["fine", text], 8)
