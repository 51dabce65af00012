"""BERT's WordPiece, CLIP's byte-pair and SentencePiece's Unigram tokenizer, on the `tokenizers` library.

A token's id is its line in `vocab.txt`, from 0. A vocabulary with CLIP's end token is a byte-pair vocabulary: bytes are
written as printable characters, a token that ends a word ends in </w>, and tokens of several characters are in the
order of the merges that form them, so that the merges follow from the tokens. In a Unigram vocabulary a tab and the
token's log probability follow each token, in XLM-RoBERTa's order; the line of <unk> ends in the model's precompiled
normalisation, in base64.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.config.errors import DataError
from pipeline.data.storage import Storage, join, split

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIALS = (PAD, UNK, CLS, SEP, MASK)
START_TEXT, END_TEXT = CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
ENDS_WORD = "</w>"  # suffix of a byte-pair token that ends a word
UNIGRAM_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CLIP_MERGES = 48_894  # of its published file, which lists 262,144
# CLIP's words: contractions, letters, single digits, runs of anything else.
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
MIN_ALPHABET = 1000  # minimum number of characters in a trained vocabulary, the most frequent ones, if it has room
MAX_WORD = 100  # characters; a longer word is [UNK], as in BERT
_LONG_RUN = re.compile(rf"\S{{{MAX_WORD + 1}}}")
CONTINUES = "##"  # prefix of a token that continues a word
RARE = 1e-7  # fraction of all characters below which a further one is not worth a token
HUGGING_FACE = "tokenizer_config.json"  # next to a vocabulary; its `do_lower_case` says whether it is uncased


class Tokens(NamedTuple):
    """One text: [CLS], its tokens, [SEP]. `word_of` numbers the words from 0 and is -1 at the special tokens."""

    ids: list[int]
    word_of: list[int]


class Tokenizer:
    """A WordPiece, byte-pair or Unigram tokenizer, picklable. Raises DataError when the lines are not a vocabulary.

    `lowercase`: lower-case text and strip its accents (default: unless `is_cased`, that is, words of the vocabulary
    have capital letters); byte-pair text is always lower-cased, as CLIP does, and keeps its accents; Unigram text never
    is. `lines` are those of the vocab.txt. `digest` identifies vocabulary and case. `ordinary_ids` (N,) int64: the
    tokens that occur in text, neither special nor BERT's [unused…]. `cls_id` and `sep_id` are those of the first and
    the last token of a text. Byte-pair vocabularies have no [UNK] and no [MASK]: their ids are -1.
    """

    def __init__(self, lines: Sequence[str], lowercase: bool | None = None):
        self.lines, self.size = tuple(lines), len(lines)
        self.is_unigram = "\t" in "".join(self.lines[:1])
        self.tokens = tuple(line.split("\t")[0] for line in self.lines) if self.is_unigram else self.lines
        ids = {token: i for i, token in enumerate(self.tokens)}
        self.is_byte_pair = END_TEXT in ids
        specials = UNIGRAM_SPECIALS if self.is_unigram else CLIP_SPECIALS if self.is_byte_pair else SPECIALS
        if missing := [name for name in specials if name not in ids]:
            raise DataError(f"the vocabulary of {self.size} tokens does not contain {', '.join(missing)}")
        if len(ids) < self.size:
            repeated = next(token for token, count in Counter(self.tokens).items() if count > 1)
            raise DataError(f"the vocabulary contains the token {repeated!r} more than once")
        if invalid := next((token for token in self.lines if re.search("[\n\ud800-\udfff]", token)), None):
            raise DataError(f"the vocabulary contains {invalid!r:.60}, which cannot be a line of a vocab.txt")
        self.vocabulary_file = ("\n".join(self.lines) + "\n").encode()
        if self.is_unigram:
            self.is_cased, self.lowercase = True, False
            self.cls_id, self.pad_id, self.sep_id, self.unk_id, self.mask_id = (ids[name] for name in specials)
            reserved = re.compile(r"<(s|pad|/s|unk|mask|unused\d+)>")
            self._pieces = unigram_pipeline(self.lines, reserved, self.unk_id)
        elif self.is_byte_pair:
            self.is_cased, self.lowercase = False, True
            self.unk_id = self.mask_id = -1
            self.cls_id, self.sep_id = (ids[name] for name in CLIP_SPECIALS)
            self.pad_id = self.sep_id
            reserved = re.compile("|".join(map(re.escape, CLIP_SPECIALS)))
            self._pieces = byte_pair_pipeline(ids)
        else:
            words = (token for token in self.tokens if not re.fullmatch(r"\[.*\]", token))
            self.is_cased = any(re.search(r"[A-Z]", token) for token in words)
            self.lowercase = not self.is_cased if lowercase is None else lowercase
            self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[name] for name in SPECIALS)
            reserved = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK|unused\d+)\]")
            # BERT's pipeline. No special token is registered: "[MASK]" in a caption is text like any other.
            self._pieces = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=MAX_WORD))
            self._pieces.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
            self._pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            self._pieces.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=True)
        self.ordinary_ids = np.array([i for token, i in ids.items() if not reserved.fullmatch(token)], dtype=np.int64)
        self.digest = hashlib.sha256((b"" if self.lowercase else b"cased\n") + self.vocabulary_file).hexdigest()

    @classmethod
    def load(cls, storage: Storage, url: str, lowercase: bool | None = None) -> Tokenizer:
        """Read a `vocab.txt`, a SentencePiece model, CLIP's `bpe_simple_vocab_16e6.txt.gz` or a list of merges like it.

        `lowercase` defaults to `do_lower_case` of a tokenizer_config.json next to it.
        """
        try:
            tokens = tokens_of(storage.read(url))
            return cls(tokens, stated_lowercase(storage, split(url)[0]) if lowercase is None else lowercase)
        except (UnicodeDecodeError, DataError, gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"{url} is not a vocabulary: {error}. Expected one token per line") from error

    @classmethod
    def train(cls, captions: Iterable[str], size: int, lowercase: bool = True) -> Tokenizer:
        """Train a vocabulary of at most `size` tokens, a function of the captions alone."""
        normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
        lines = [normalizer.normalize_str(caption) for caption in captions]
        for number, line in enumerate(lines):
            if _LONG_RUN.search(line):  # longer words become [UNK] anyway: one of 200,000 takes a minute to merge
                words = splitter.pre_tokenize_str(line)
                lines[number] = " ".join(word for word, _ in words if len(word) <= MAX_WORD)
        counts = Counter(character for line in lines for character in line if not character.isspace())
        if not counts:
            raise DataError("cannot train a vocabulary: no caption has a visible character")
        if not (alphabet := choose_alphabet(counts, size - len(SPECIALS), normalizer)):
            raise DataError(f"a vocabulary of {size} tokens has no room for characters; set at least 64")
        known = {piece.removeprefix(CONTINUES) or piece for piece in alphabet}
        spelled = str.maketrans(dict.fromkeys(counts.keys() - known, " "))
        pieces = cls(SPECIALS, lowercase)._pieces
        # The library numbers characters in hash-table order and breaks ties by number: it is given them in order.
        specials: list[Any] = [*SPECIALS, *alphabet]
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, show_progress=False, special_tokens=specials, limit_alphabet=len(known)
        )
        pieces.train_from_iterator((line.translate(spelled) for line in lines), trainer)
        vocabulary = pieces.get_vocab()
        return cls(sorted(vocabulary, key=lambda token: vocabulary[token]), lowercase)

    def encode(self, text: str, max_length: int) -> Tokens:
        """Encode one text as `encode_batch` does."""
        return self.encode_batch([text], max_length)[0]

    def encode_batch(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return each text's tokens, cut to `max_length` with [CLS] and [SEP]. Raises DataError for invalid Unicode."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                where = f"{text[error.start]!r} at character {error.start}"
                raise DataError(f"the text {text[:40]!r} is not valid Unicode ({where}); give it as UTF-8") from error
        # Not by enable_truncation, which changes the state of a tokenizer that threads share.
        room = max_length - 2
        assert room >= 0, f"max_length {max_length} leaves no room for [CLS] and [SEP]"
        encoded = []
        for pieces in self._pieces.encode_batch(list(texts), add_special_tokens=False):
            words = [-1 if word is None else word for word in pieces.word_ids[:room]]
            encoded.append(Tokens([self.cls_id, *pieces.ids[:room], self.sep_id], [-1, *words, -1]))
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids without padding, start and end; [MASK] and [UNK] are kept."""
        frame = {self.pad_id, self.cls_id, self.sep_id}
        text = self._pieces.decode([int(i) for i in ids if int(i) not in frame], skip_special_tokens=False)
        return text.replace(ENDS_WORD, " ").strip() if self.is_byte_pair else text


def byte_pair_pipeline(ids: dict[str, int]) -> tokenizers.Tokenizer:
    """Return CLIP's tokenization of text into a vocabulary, without its repair of mis-decoded text (`ftfy`)."""
    model = models.BPE(ids, byte_pair_merges(list(ids)), unk_token=END_TEXT, end_of_word_suffix=ENDS_WORD)
    pieces = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    pieces.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    pieces.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pieces.decoder = decoders.ByteLevel()
    return pieces


def unigram_pipeline(lines: Sequence[str], reserved: re.Pattern[str], unk_id: int) -> tokenizers.Tokenizer:
    """Return XLM-RoBERTa's tokenization into a Unigram vocabulary. Raises DataError for a line without a number."""
    pieces, normalisation = list[tuple[str, float]](), ""
    for number, line in enumerate(lines):
        token, *columns = line.split("\t")
        try:
            score = float(columns[0])
        except (IndexError, ValueError) as error:
            raise DataError(
                f"line {number + 1} is {line[:40]!r}; expected a token, a tab and a log probability"
            ) from error
        # No word contains a space: "<mask>" in a caption is text like any other.
        pieces.append((f" {token}" if reserved.fullmatch(token) else token, score))
        normalisation = columns[1] if number == unk_id and len(columns) > 1 else normalisation
    pipeline = tokenizers.Tokenizer(models.Unigram(pieces, unk_id, byte_fallback=False))
    if normalisation:
        try:
            pipeline.normalizer = normalizers.Precompiled(base64.b64decode(normalisation, validate=True))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"the normalisation in the line of <unk> is damaged ({error})") from error
    marked = pre_tokenizers.Metaspace(prepend_scheme="always")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marked])
    pipeline.decoder = decoders.Metaspace(prepend_scheme="always")
    return pipeline


def sentence_pieces(data: bytes) -> list[str]:
    """Return the lines of the vocabulary of a SentencePiece model, as XLM-RoBERTa numbers its tokens.

    Raises DataError for a damaged file, another algorithm than Unigram, and one that begins with other tokens.
    """
    from transformers.convert_slow_tokenizer import import_protobuf  # takes seconds, for the message's definition

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, without an import of protobuf
        raise DataError(f"a damaged SentencePiece model ({error})") from error
    first = [piece.piece for piece in model.pieces[:3]]
    if model.trainer_spec.model_type != 1 or first != ["<unk>", "<s>", "</s>"]:
        raise DataError(
            f"a SentencePiece model of type {model.trainer_spec.model_type} with the first tokens {', '.join(first)}; "
            "supported is type 1 (Unigram) with <unk>, <s>, </s>, as BEiT-3 and XLM-RoBERTa have"
        )
    normalisation = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    specials = [f"{name}\t0.0" for name in UNIGRAM_SPECIALS]
    specials[3] += f"\t{normalisation}" if normalisation else ""
    return [*specials[:4], *(f"{piece.piece}\t{piece.score!r}" for piece in model.pieces[3:]), specials[4]]


def byte_pair_merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return the merges that form the tokens, in their order: each one's parts after all merges before its own.

    Raises DataError for a token that earlier ones do not form.
    """
    rank, merges = {token: number for number, token in enumerate(tokens)}, []
    for number, token in enumerate(tokens):
        word = token.removesuffix(ENDS_WORD)
        if len(word) <= 1 or token in CLIP_SPECIALS:
            continue
        parts = [*word[:-1], word[-1] + token[len(word) :]]
        while len(parts) > 2:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair[0] + pair[1], number))
            if rank.get(best[0] + best[1], number) >= number:
                raise DataError(
                    f"no two tokens above {token!r} form it; the tokens must be in the order of their merges"
                )
            at = 0
            while at + 1 < len(parts):
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = [best[0] + best[1]]
                at += 1
        merges.append((parts[0], parts[1]))
    return merges


def stated_lowercase(storage: Storage, folder: str) -> bool | None:
    """Return `do_lower_case` of a folder's tokenizer_config.json; None without the file or the key."""
    url = join(folder, HUGGING_FACE)
    if not storage.exists(url):
        return None
    try:
        lowercase = json.loads(storage.read(url)).get("do_lower_case")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{url} is not a JSON object ({error}). Correct it, or set tokenizer.lowercase") from error
    return lowercase if isinstance(lowercase, bool) else None


def tokens_of(data: bytes) -> list[str]:
    """Return the lines of a `vocab.txt`, or those of a SentencePiece model, or of byte-pair merges, perhaps compressed.

    A byte order mark and blank lines at the end are ignored. Merges follow a line that contains "#version"; their
    tokens are in CLIP's order: each byte, each byte that ends a word, the merges, start and end.
    """
    if data[:1] == data[2:3] == b"\n":  # a message in whose first field, the first token, a message begins, too
        return sentence_pieces(data)
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "#version" not in lines[0]:
        return lines
    printable = [byte for start, end in ((33, 127), (161, 173), (174, 256)) for byte in range(start, end)]
    letters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]  # of the other bytes in their order
    merges = [line.replace(" ", "") for line in lines[1 : CLIP_MERGES + 1]]
    return [*letters, *(letter + ENDS_WORD for letter in letters), *merges, *CLIP_SPECIALS]


def choose_alphabet(counts: Counter[str], room: int, normalizer: normalizers.Normalizer) -> list[str]:
    """Return at most `room` single-character tokens: first those that begin a word, then those that continue one. The
    most frequent characters are taken (one left out makes its whole word [UNK]); beyond 1,000, rare strays are left
    out.
    """
    splitter, total, begins, continues = pre_tokenizers.BertPreTokenizer(), counts.total(), list[str](), list[str]()
    for place, character in enumerate(sorted(counts, key=lambda c: (-counts[c], c))):
        # Punctuation and Chinese characters are words of their own and never continue a word.
        is_word = len(splitter.pre_tokenize_str(normalizer.normalize_str(f"a{character}"))) > 1
        is_stray = place >= MIN_ALPHABET and counts[character] < RARE * total
        if is_stray or len(begins) + len(continues) + (1 if is_word else 2) > room:
            break
        begins.append(character)
        continues += [] if is_word else [f"{CONTINUES}{character}"]
    return [*sorted(begins), *sorted(continues)]
