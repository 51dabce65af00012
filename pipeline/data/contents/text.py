"""Captions to token ids: BERT's uncased WordPiece, by the `tokenizers` library, with the word each token is part of.

A vocabulary is a list of tokens; a token's id is its place. On disk it is BERT's `vocab.txt`, one token a line.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.config.errors import DataError
from pipeline.data.storage import Storage

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIALS = (PAD, UNK, CLS, SEP, MASK)
MAX_ALPHABET = 1000  # distinct characters a trained vocabulary spells with, as in BERT's own training


@dataclass(frozen=True)
class Tokens:
    """One text: [CLS], its tokens, [SEP]. `word_of` numbers the words from 0 and is -1 at the two specials."""

    ids: list[int]
    word_of: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """An uncased WordPiece tokenizer. Equal vocabularies give equal tokenizers; `digest` names the vocabulary."""

    def __init__(self, tokens: Sequence[str]):
        self.tokens = tuple(tokens)
        ids = _checked_ids(self.tokens)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[name] for name in SPECIALS)
        model = models.WordPiece(vocab=ids, unk_token=UNK, max_input_chars_per_word=100)
        self._pieces = _bert_pieces(model)
        self._pieces.decoder = decoders.WordPiece(prefix="##", cleanup=True)

    @classmethod
    def from_vocabulary(cls, tokens: Sequence[str]) -> Tokenizer:
        return cls(tokens)

    @classmethod
    def load(cls, storage: Storage, url: str) -> Tokenizer:
        """Read a `vocab.txt`. Raises DataError naming the file when it is no such vocabulary."""
        try:
            lines = storage.read(url).decode("utf-8").removesuffix("\n").split("\n")
            return cls([line.removesuffix("\r") for line in lines])
        except (UnicodeDecodeError, DataError) as error:
            raise DataError(f"{url} is no WordPiece vocabulary: {error}. Expected one token a line") from error

    def save(self, storage: Storage, url: str) -> None:
        storage.write(url, self._text.encode("utf-8"))

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> Tokenizer:
        """A vocabulary of at most `size` tokens, the same whenever the captions are the same."""
        return cls(_train_vocabulary(captions, size))

    @property
    def size(self) -> int:
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self._text.encode("utf-8")).hexdigest()

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Ids (N,) int64 of the tokens that text can hold: neither special nor one of BERT's [unused…]."""
        reserved = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK|unused\d+)\]")
        return np.array([i for i, token in enumerate(self.tokens) if not reserved.fullmatch(token)], dtype=np.int64)

    def encode(self, text: str, max_length: int) -> Tokens:
        """At most `max_length` tokens, [CLS] and [SEP] included; what is longer is cut at the end.

        Raises DataError for a text that is not valid Unicode, such as an argument in another encoding than UTF-8.
        """
        _check_unicode([text])
        return self._framed(self._pieces.encode(text, add_special_tokens=False), max_length)

    def encode_batch(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Each text as by `encode`."""
        _check_unicode(texts)
        pieces = self._pieces.encode_batch(list(texts), add_special_tokens=False)
        return [self._framed(each, max_length) for each in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text, lower-case, without [PAD], [CLS] and [SEP]; [MASK] and [UNK] stay visible."""
        frame = {self.pad_id, self.cls_id, self.sep_id}
        return self._pieces.decode([int(i) for i in ids if int(i) not in frame], skip_special_tokens=False)

    def _framed(self, pieces: tokenizers.Encoding, max_length: int) -> Tokens:
        # Cut here rather than by enable_truncation: that is state of the tokenizer, which threads share.
        room = max_length - 2
        assert room >= 0, f"max_length {max_length} leaves no room for [CLS] and [SEP]"
        words = [-1 if word is None else word for word in pieces.word_ids[:room]]
        return Tokens([self.cls_id, *pieces.ids[:room], self.sep_id], [-1, *words, -1])

    @property
    def _text(self) -> str:
        return "\n".join(self.tokens) + "\n"

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokens"])  # type: ignore[misc]


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{error.object[error.start]!r} at character {error.start}"
            raise DataError(f"the text {text[:40]!r} is not valid Unicode ({where}); give it as UTF-8") from error


def _checked_ids(tokens: tuple[str, ...]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if missing := [name for name in SPECIALS if name not in ids]:
        raise DataError(f"the vocabulary of {len(tokens)} tokens lacks {', '.join(missing)}")
    if len(ids) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise DataError(f"the vocabulary names the token {twice!r} more than once")
    return ids


def _bert_pieces(model: models.Model) -> tokenizers.Tokenizer:
    """BERT uncased: clean, lower-case, strip accents, split at spaces and punctuation.

    No special token is registered, so a caption that spells "[MASK]" is text like any other.
    """
    pieces = tokenizers.Tokenizer(model)
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return pieces


def _train_vocabulary(captions: Iterable[str], size: int) -> list[str]:
    """WordPiece by merges of the most frequent pair.

    The library numbers characters in the order of a hash table and breaks ties between merges by number, so
    that the same captions give another vocabulary each time. Handing it the characters as tokens that already
    have a number, in sorted order, makes it a function of the captions.
    """
    lines = [normalizers.BertNormalizer(lowercase=True).normalize_str(caption) for caption in captions]
    counts = Counter(character for line in lines for character in line if not character.isspace())
    if not counts:
        raise DataError("no vocabulary can be trained: there is no caption with a visible character")
    room = min(MAX_ALPHABET, (size - len(SPECIALS)) // 2)  # a character may begin a word or continue one
    if room < 1:
        raise DataError(f"a vocabulary of {size} tokens has no room for characters; expected at least 64")
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:room])
    spelled = str.maketrans(dict.fromkeys(counts.keys() - set(alphabet), " "))
    pieces = _bert_pieces(models.WordPiece({UNK: 0}, unk_token=UNK))
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIALS, *alphabet, *(f"##{character}" for character in alphabet)],
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    pieces.train_from_iterator((line.translate(spelled) for line in lines), trainer)
    vocabulary = pieces.get_vocab()
    return sorted(vocabulary, key=lambda token: vocabulary[token])
