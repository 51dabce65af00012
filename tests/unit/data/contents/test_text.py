"""The WordPiece, byte-pair and Unigram tokenizers, and the training of vocabularies."""

import gzip
import json
import pickle
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers.normalizers import BertNormalizer
from transformers.convert_slow_tokenizer import import_protobuf

from pipeline.config.errors import DataError
from pipeline.data.contents.text import SPECIALS, Tokenizer, byte_pair_merges, choose_alphabet
from pipeline.data.storage import Storage

ROOT = Path(__file__).resolve().parents[4]
CAPTIONS = [
    "A large red circle to the left of a small blue square.",
    "Two dogs — one black, one brown — are playing catch; it's snowing!",
    "Un café très élégant près de l'église",
    "playing played player play replay",
]
CASED = [*SPECIALS, "the", "Rome", "rome", "é", "e", "RED"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS * 20, size=160)


def written(folder: Path, content: str, config: str | None = None) -> str:
    (folder / "vocab.txt").write_bytes(content.encode())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return str(folder / "vocab.txt")


def test_texts_are_framed_cut_numbered_and_decoded_whatever_their_case_and_spelt_specials(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("A red playground", max_length=40)
    words = len(tokens.ids) - 4  # of 'playground', which was never seen
    assert (tokens.ids[0], tokens.ids[-1], words > 1) == (tokenizer.cls_id, tokenizer.sep_id, True)
    assert tokens.word_of == [-1, 0, 1, *[2] * words, -1]
    whole, cut = (tokenizer.encode(CAPTIONS[0], length) for length in (100, 7))
    assert (cut.ids, cut.word_of) == ([*whole.ids[:6], tokenizer.sep_id], [*whole.word_of[:6], -1])
    assert tokenizer.encode_batch([*CAPTIONS, "  "], 12) == [tokenizer.encode(text, 12) for text in [*CAPTIONS, "  "]]
    assert tokenizer.encode("  ", 12).ids == [tokenizer.cls_id, tokenizer.sep_id]
    for invalid in ("caf\udce9", "nice \ud83d", "\ude00\ud83d"):
        with pytest.raises(DataError, match="is not valid Unicode"):
            tokenizer.encode_batch(["fine", invalid], 8)
    assert tokenizer.encode("CAFÉ élégant", 40) == tokenizer.encode("cafe elegant", 40)
    specials = {tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
    assert not specials & set(tokenizer.encode("a [MASK] on the [CLS] [PAD] [SEP]", 40).ids[1:-1])
    ids = tokenizer.encode("a large red circle", 40).ids
    assert tokenizer.decode(ids) == "a large red circle"
    ids[3] = tokenizer.mask_id
    assert tokenizer.decode([*ids, tokenizer.pad_id]) == "a large [MASK] circle"


def test_trained_vocabularies_start_with_specials_keep_size_and_are_reproducible(tokenizer: Tokenizer) -> None:
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert (ids, tokenizer.tokens[:5], tokenizer.size <= 160) == ((0, 1, 2, 3, 4), SPECIALS, True)
    assert set(tokenizer.ordinary_ids) == set(range(5, tokenizer.size))
    assert Tokenizer.train(["äöüß" + "".join(map(chr, range(0x3B1, 0x3C9)))], size=20).size <= 20
    with pytest.raises(DataError, match="no caption"):
        Tokenizer.train(["", "  "], 100)
    code = "import json, sys; from pipeline.data.contents.text import Tokenizer;"
    code += "print(Tokenizer.train(json.load(sys.stdin) * 20, 160).digest)"
    options: dict[str, Any] = {"input": json.dumps(CAPTIONS), "capture_output": True, "text": True, "cwd": ROOT}
    runs = [subprocess.run([sys.executable, "-c", code], check=True, **options) for _ in range(2)]
    assert {run.stdout.strip() for run in runs} == {tokenizer.digest}


def test_saved_and_pickled_tokenizers_are_the_same_and_faulty_files_are_named(tokenizer, tmp_path: Path) -> None:
    url = written(tmp_path, tokenizer.vocabulary_file.decode())
    for copy in (Tokenizer.load(Storage(), url), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        assert (copy.digest, copy.tokens) == (tokenizer.digest, tokenizer.tokens)
        assert copy.encode(CAPTIONS[1], 40) == tokenizer.encode(CAPTIONS[1], 40)
    repeated = "\n".join(SPECIALS) + "\nred\nred\n"
    faults = {"a\nb\n": r"does not contain \[PAD\]", repeated: "'red' more than once", "": r"does not contain \[PAD\]"}
    for content, fault in faults.items():
        with pytest.raises(DataError, match=rf"vocab\.txt.*{fault}"):
            Tokenizer.load(Storage(), written(tmp_path, content))
    tokens = [*SPECIALS, "red", "##s"]
    for content in ("\ufeff{}", "{}\n", "{}\n\n", "{}\r\n\r\n", "\ufeff{}\n\n\n"):
        loaded = Tokenizer.load(Storage(), written(tmp_path, content.format("\n".join(tokens))))
        assert (loaded.tokens, loaded.digest) == (tuple(tokens), Tokenizer(tokens).digest)


def test_published_vocabulary_encodes_as_transformers_does(shared: Path) -> None:
    ours = Tokenizer.load(Storage(), str(shared / "data" / "bert_vocab" / "vocab.txt"))
    ids = {token: i for i, token in enumerate(ours.tokens)}
    theirs = transformers.BertTokenizer(vocab=ids, do_lower_case=True)
    lines = (shared / "data" / "flickr8k_3k" / "val.jsonl").read_text().splitlines()[:100]
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    expected = theirs(captions + CAPTIONS, max_length=20, truncation=True)["input_ids"]
    assert len(expected) > 400
    assert [tokens.ids for tokens in ours.encode_batch(captions + CAPTIONS, 20)] == expected
    assert not any(ours.tokens[i].startswith("[unused") for i in ours.ordinary_ids)


def test_byte_pairs_encode_as_transformers_clip_does_and_their_merges_follow_from_the_tokens(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = tokenizers.normalizers.Lowercase()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(CAPTIONS * 3, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    assert len(merges) > 50
    content = "\n".join(["bpe_simple_vocab#version: 0.2", *(" ".join(pair) for pair in merges)]).encode()
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress(content))
    ours = Tokenizer.load(Storage(), str(tmp_path / "merges.txt.gz"))
    assert ours.size == 512 + len(merges) + 2
    assert byte_pair_merges(ours.tokens) == merges
    theirs = transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(ours.tokens)}, merges=merges)
    texts = [
        *CAPTIONS,
        "",
        "IT'S 2024, they'll",
        "naïve Café\t中文 😀\u200b",
        "x" * 300,
        "a.b/c?d=e&f  #tag",
        "\x00\x7f",
        "word " * 50,
    ]
    for text in texts:
        assert ours.encode(text, 30).ids == theirs(text, truncation=True, max_length=30)["input_ids"]
    assert ours.decode(ours.encode("A naïve café 😀", 30).ids) == "a naïve café 😀"
    (tmp_path / "vocab.txt").write_bytes(ours.vocabulary_file)
    saved = pickle.loads(pickle.dumps(Tokenizer.load(Storage(), str(tmp_path / "vocab.txt"))))  # noqa: S301
    assert saved.digest == ours.digest
    assert saved.encode_batch(CAPTIONS, 12) == ours.encode_batch(CAPTIONS, 12)
    with pytest.raises(DataError, match="order of their merges"):
        Tokenizer([*reversed(ours.tokens)])


def test_sentence_pieces_encode_as_transformers_xlm_roberta_does(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(CAPTIONS * 3, trainer)
    # A double-array trie (darts-clone) of the one key "Q": its node has the label, a leaf, and the leaf's place.
    trie = [0] * 256
    trie[ord("Q")] = ord("Q") | 1 << 8 | (ord("Q") ^ 1) << 10
    normalisation = struct.pack("<I256I", 1024, *trie) + b"q\0"
    model = import_protobuf().ModelProto()
    pieces: list[tuple[str, float]] = json.loads(trained.to_str())["model"]["vocab"]
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.model_type = 1
    model.normalizer_spec.precompiled_charsmap = normalisation
    (tmp_path / "beit3.spm").write_bytes(model.SerializeToString())
    ours = Tokenizer.load(Storage(), str(tmp_path / "beit3.spm"))
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece.piece, piece.score) for piece in model.pieces[3:]] + [("<mask>", 0.0)]
    theirs = transformers.XLMRobertaTokenizer(vocab=vocabulary, _spm_precompiled_charsmap=normalisation)
    assert (ours.size, ours.pad_id, ours.mask_id) == (len(pieces) + 2, theirs.pad_token_id, theirs.mask_token_id)
    for text in (*CAPTIONS, "", "  Quite  red\t dog ", "中文 dog😀", "RED dog " * 30):
        assert ours.encode(text, 30).ids == theirs(text, truncation=True, max_length=30)["input_ids"]
    assert ours.decode(ours.encode("Quite a red dog", 30).ids).startswith("q")
    spelt = ours.encode("<mask> on the <s> <pad> </s>", 30).ids[1:-1]  # text like any other
    assert not {ours.cls_id, ours.pad_id, ours.sep_id, ours.mask_id} & set(spelt)
    assert set(ours.ordinary_ids) == set(range(4, ours.size - 1))
    assert ours.encode("a red dog", 30).word_of[:2] == [-1, 0]
    (tmp_path / "vocab.txt").write_bytes(ours.vocabulary_file)
    saved = pickle.loads(pickle.dumps(Tokenizer.load(Storage(), str(tmp_path / "vocab.txt"))))  # noqa: S301
    assert (saved.digest, saved.encode_batch(CAPTIONS, 12)) == (ours.digest, ours.encode_batch(CAPTIONS, 12))
    unnumbered = "\n".join([*ours.lines[:4], "red", "<mask>\t0"])
    faults = {"<s>\t0\nred\n": "does not contain <pad>", unnumbered: "line 5 is 'red'; expected a token, a tab"}
    for content, fault in faults.items():
        with pytest.raises(DataError, match=fault):
            Tokenizer.load(Storage(), written(tmp_path, content))
    model.trainer_spec.model_type = 2
    for damaged, fault in ((model.SerializeToString(), "of type 2"), (b"\n\x0e\n" + b"\xff" * 9, "damaged")):
        (tmp_path / "beit3.spm").write_bytes(damaged)
        with pytest.raises(DataError, match=fault):
            Tokenizer.load(Storage(), str(tmp_path / "beit3.spm"))


def test_cased_vocabulary_keeps_capitals_and_accents_and_hugging_faces_config_states_the_case(tmp_path: Path) -> None:
    cased, lower = Tokenizer(CASED), Tokenizer(CASED, lowercase=True)
    words = [[t.tokens[i] for i in t.encode("the Rome RED é", 9).ids[1:-1]] for t in (cased, lower)]
    assert words == [["the", "Rome", "RED", "é"], ["the", "rome", "[UNK]", "e"]]
    assert cased.digest != lower.digest
    assert pickle.loads(pickle.dumps(lower)).encode("Rome", 9) == lower.encode("Rome", 9)  # noqa: S301
    url = written(tmp_path, "\n".join(CASED))
    assert Tokenizer.load(Storage(), url).digest == cased.digest
    assert Tokenizer.load(Storage(), url, lowercase=True).digest == lower.digest
    assert Tokenizer([*SPECIALS, "[unused0]", "[START A]", "red"]).lowercase  # reserved tokens decide nothing
    trained = Tokenizer.train(["Rome is Rome"] * 9, 64, lowercase=False)
    assert (trained.lowercase, "R" in trained.tokens) == (False, True)
    for stated in (True, False):
        url = written(tmp_path, "\n".join(CASED), json.dumps({"do_lower_case": stated}))
        assert Tokenizer.load(Storage(), url).lowercase is stated
        assert Tokenizer.load(Storage(), url, lowercase=not stated).lowercase is not stated
    for config in ("[]", "{", "[" * 20_000, '"x"'):
        with pytest.raises(DataError, match=r"tokenizer_config\.json"):
            Tokenizer.load(Storage(), written(tmp_path, "\n".join(CASED), config))


def test_alphabet_grows_with_the_size_of_the_vocabulary_and_overlong_words_are_dropped() -> None:
    characters = "".join(chr(0x4E00 + n) for n in range(3500))  # Chinese; the first hundred are most frequent
    captions = [characters[first : first + 20] for first in range(0, 3500, 20)] + [characters[:100]] * 9
    whole, small = Tokenizer.train(captions, 30522), Tokenizer.train(captions, 2000)
    ids = [[i for tokens in t.encode_batch(captions, 10**6) for i in tokens.ids[1:-1]] for t in (whole, small)]
    assert whole.unk_id not in ids[0]
    assert 0.2 < ids[1].count(small.unk_id) / len(ids[1]) < 0.5
    assert not [token for token in whole.tokens if token.startswith("##")]
    assert (small.size, set(characters[:100]) <= set(small.tokens)) == (2000, True)
    for frequent, kept in ((10_000_000, 1100), (2, 1200)):  # rare ones beyond a thousand are dropped
        counts = Counter({character: frequent if n < 1100 else 2 for n, character in enumerate(characters[:1200])})
        assert len(choose_alphabet(counts, 30_000, BertNormalizer())) == kept
    captions = ["a red cat, a blue dog", "x" * 100]
    whole = Tokenizer.train(captions, 200)
    for character in "w😀":
        long = character * 1_000_000  # took hours when merges were learned from them
        assert Tokenizer.train([f"{captions[0]} {long}", captions[1]], 200).tokens == whole.tokens
    assert [whole.unk_id in whole.encode("x" * length, 9).ids for length in (100, 101)] == [False, True]
    assert "word" in Tokenizer.train(["/".join(["word"] * 60)], 200).tokens
