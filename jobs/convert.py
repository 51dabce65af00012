"""`mome import` and `mome export`: convert weights from and to published formats.

A published checkpoint is a single file of tensors, or a Hugging Face folder:

model.safetensors | pytorch_model.bin            all tensors
model.safetensors.index.json | pytorch_model.bin.index.json    the file of each tensor
config.json                                      the model's sizes and the labels of its head
preprocessor_config.json | processor_config.json image preprocessing
vocab.txt | tokenizer.json | vocab.json, merges.txt    vocabulary

Imported weights become a folder like a finished stage's, without a real source: `mome evaluate` needs `--source`.
"""

import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from pipeline.config.errors import CheckpointError, ConfigError, MomeError, StorageError
from pipeline.config.load import apply_override, load_config, validate
from pipeline.config.schema import OBJECTIVES, DataConfig, RunConfig, SourceType, StageConfig, TransformerConfig
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.text import HUGGING_FACE, Tokenizer, byte_pair_merges, stated_lowercase
from pipeline.data.storage import NotFound, Storage, join, split
from pipeline.models import skeleton
from pipeline.models.checkpoints.conversion import INTERPOLATIONS, Format, State
from pipeline.models.checkpoints.files import Published, read_json, read_tensors, write_tensors
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.models.model import COLOUR_CLASSES, HeadConfig, ImageTarget
from pipeline.objectives import head_config, modules_for
from pipeline.training.checkpoint.committed import COMMIT
from pipeline.training.checkpoint.weights import FILE, Weights, load_weights, save_weights
from pipeline.training.stages import check_fit

log = logging.getLogger(__name__)

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
PROCESSOR, PROCESSORS = "preprocessor_config.json", "processor_config.json"
VOCABULARY, TOKENIZER, BYTE_PAIRS, MERGES = "vocab.txt", "tokenizer.json", "vocab.json", "merges.txt"
NO_SOURCE = "none"
FILE_NAME = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)$")  # of an exported file; another name is a folder
# Metadata keys of the files we write (JSON values), next to those of the answers and classes of heads.
MODEL_KEY, IMAGE_TARGET_KEY = "model", "image_target"
# One stage per source type that the heads support; the weights belong to the last one.
USES: tuple[SourceType, ...] = ("images", "text", "labelled", "regions", "pairs", "questions", "statements")
UNNAMED = {
    ANSWERS: "the %d answers have no names: give --answers FILE (a JSON list) for mome predict and mome evaluate",
    CLASSES: "the %d classes have no names: mome predict gives their numbers",
}


def import_weights(
    path: str,
    format_name: str,
    out: str,
    overrides: Iterable[str] = (),
    model: Path | None = None,
    vocabulary: str | None = None,
    may_differ: tuple[str, ...] = (),
    answers: str | None = None,
) -> dict[str, Any]:
    """Write the weights of a published file or folder where `start_from` reads them; return their description.

    Sizes come from `overrides` (`heads=16`), else the config `model`, else our file's header, else config.json, else
    the tensors' shapes. Tensors whose names match `may_differ` may be missing, unexpected or of another shape.
    """
    storage, chosen = Storage(), _format(format_name)
    if existing := [name for name in storage.list(out) if FILE.fullmatch(name) or name == COMMIT]:
        raise ConfigError(
            f"--out {out}: holds {existing[0]}, which would be lost; name another folder, or delete it first"
        )
    published, folder = read_published(storage, path, chosen)
    try:
        section = _section(published, chosen, model, overrides)
        # Copies, because a file may hold one memory under two names (tied embeddings), and ours may not.
        state = {name: t.clone() for name, t in chosen.read(published.tensors, section, may_differ).items()}
        image_target = chosen.image_target
        if (stated := json.loads(published.metadata.get(IMAGE_TARGET_KEY, "null"))) is not None:
            image_target = TypeAdapter(ImageTarget).validate_python(stated)
        heads = _heads(state, section.patch_size, image_target)
        # The vocabulary's size is the number of rows of whatever grows with it; 0 for a model that reads no text.
        small, large = (dict(skeleton(section, size).named_parameters()) for size in (1, 2))
        grows = [name for name in small if small[name].shape != large[name].shape and name in state]
        num_words = len(state[grows[0]]) if grows else 0
        full = skeleton(section, max(num_words, 1), heads)
        head_parts, lacking = set(full.HEAD_PARTS), {full.part_of(n) for n in full.state_dict() if n not in state}
        absent = lacking - head_parts
        check_fit(full, state, f"{path}: the model", frozenset(absent))
        # Integers of a quantised model are no weights without their scales.
        if others := {name: tensor.dtype for name, tensor in state.items() if not tensor.is_floating_point()}:
            name, dtype = next(iter(others.items()))
            raise CheckpointError(
                f"{path}: {len(others)} of {len(state)} tensors hold {str(dtype).removeprefix('torch.')} ({name}); "
                "expected floating-point weights. Give the checkpoint that was not quantised"
            )
    except MomeError:
        raise
    except Exception as error:  # a converter may trip over anything in tensors of any shapes under a format's names
        raise CheckpointError(
            f"{path}: its tensors are not those of a model in the format {format_name} "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    tokenizer = _tokenizer(storage, vocabulary, folder if chosen.model_type else None, num_words) if num_words else None
    choices = _choices(storage, published, heads, answers)
    # A head that would be drawn in part serves no objective.
    complete = head_parts & {full.part_of(name) for name in state} - lacking
    uses: dict[SourceType, list[str]] = {}
    for source_type, objective in itertools.product(USES, OBJECTIVES):
        parts = head_parts & (modules_for(full, objective, source_type) or frozenset())
        if parts and parts <= complete:
            uses.setdefault(source_type, []).append(objective)
    sizes = section.model_dump(mode="json")
    max_text_length = section.max_text_length
    if section.kind != "dual_encoder":  # CLIP's texts are short, and VLMo's relative positions reach further than any
        max_text_length = min(max_text_length, StageConfig.model_fields["max_text_length"].default)
    config = _config(out, sizes, uses, heads, tokenizer, max_text_length)
    metadata = {
        "config": config.model_dump(mode="json"),
        "stage": config.stages[-1].name,
        "step": 0,
        "absent": sorted(absent),
        "imported": {"from": path, "format": format_name},
    }
    save_weights(storage, out, state, list(tokenizer.lines) if tokenizer else [], metadata, choices)
    return {
        "checkpoint": out,
        "model": sizes,
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "absent": sorted(absent),
        "objectives": [objective for stage in config.stages for objective in stage.objectives],
        "choices": {name: len(names) for name, names in choices.items()},
    }


def export_weights(checkpoint: str, format_name: str, out: str) -> dict[str, Any]:
    """Write a stage's weights in a published format, with a header for `import_weights`, and verify them.

    `out` is a file, or a folder that transformers reads with the config, vocabulary and image processor.
    """
    storage, chosen = Storage(), _format(format_name)
    weights = load_weights(storage, checkpoint.rstrip("/"))
    config, section = weights.config, weights.config.model
    if chosen.kinds is not None and section.kind not in chosen.kinds:
        raise ConfigError(f"--format {format_name} holds models of kind {', '.join(chosen.kinds)}, not {section.kind}")
    target = head_config(config, config.stages.index(config.stage_named(weights.stage))).image_target
    header = {
        "format": "pt",
        MODEL_KEY: section.model_dump_json(),
        **({} if target is None else {IMAGE_TARGET_KEY: json.dumps(target)}),
        **{name: choices.to_bytes().decode() for name, choices in weights.choices.items()},
    }
    is_folder = not FILE_NAME.search(out)
    published = chosen.write(weights.tensors, section)
    files = _folder_files(weights, chosen) if is_folder else {}
    path = join(out, WEIGHTS[0]) if is_folder else out
    data = write_tensors(published, path, header)
    reread = chosen.read(read_tensors(data, path).tensors, section, ())
    changed = [n for n in reread if chosen.exact and not torch.equal(reread[n], weights.tensors[n])]
    assert not changed, f"format {format_name} changes {', '.join(changed)}"
    files = {join(out, name): content for name, content in files.items()} | {path: data}
    for url, content in files.items():
        if storage.exists(url) and storage.read(url) != content:
            raise ConfigError(f"--out {out}: would overwrite another file ({url}); give another name, or delete it")
    for url, content in files.items():
        storage.write(url, content)
    return {
        "path": out,
        "format": format_name,
        "tensors": len(published),
        "bytes": len(data),
        "left_out": sorted(weights.tensors.keys() - reread.keys()),  # what the format has no names for
    }


def _folder_files(weights: Weights, chosen: Format) -> dict[str, bytes]:
    """Return the files next to exported weights with which transformers reads them, by name."""
    section, tensors = weights.config.model, weights.tensors
    labels: Sequence[str] = ("False", "True") if "nlvr2_head.classify.bias" in tensors else ()
    for list_name, head in ((ANSWERS, "vqa_head"), (CLASSES, "classification_head")):
        if (bias := tensors.get(f"{head}.classify.bias")) is not None:
            labels = weights.choices.get(list_name) or [f"LABEL_{number}" for number in range(len(bias))]
    vocabulary, texts = weights.vocabulary, dict[str, str]()
    values = {"config.json": chosen.hugging_face_config(tensors, section, len(vocabulary), labels)}
    if vocabulary:
        tokenizer = Tokenizer(vocabulary, weights.config.tokenizer.lowercase)
        if tokenizer.is_unigram:
            raise ConfigError("a Unigram vocabulary cannot be written into a Hugging Face folder; give a file's name")
        named: dict[str, Any] = {"model_max_length": section.max_text_length}
        if tokenizer.is_byte_pair:
            values[BYTE_PAIRS] = {token: number for number, token in enumerate(vocabulary)}
            merges = [" ".join(pair) for pair in byte_pair_merges(vocabulary)]
            texts[MERGES] = "\n".join(["#version: 0.2", *merges, ""])
            values[HUGGING_FACE] = named | {"tokenizer_class": "CLIPTokenizer"}
        else:
            texts[VOCABULARY] = "\n".join([*vocabulary, ""])
            values[HUGGING_FACE] = named | {"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lowercase}
    if chosen.image_processor:
        resample = next(number for number, name in INTERPOLATIONS.items() if name == section.interpolation)
        side: dict[str, int] = {"height": section.image_size, "width": section.image_size}
        is_cropped, size = section.image_fit == "centre_crop", side
        if is_cropped or section.kind == "vilt":
            size = {"shortest_edge": section.image_size}
        values[PROCESSOR] = {
            "image_processor_type": chosen.image_processor, "do_resize": True, "size": size, "resample": resample,
            "do_rescale": True, "do_normalize": True, "image_mean": section.image_mean, "image_std": section.image_std,
            **({"do_center_crop": True, "crop_size": side} if is_cropped else {}),
            **({"size_divisor": section.patch_size, "do_pad": True} if section.kind == "vilt" else {}),
        }  # fmt: skip
    texts |= {name: json.dumps(value, indent=2) for name, value in values.items()}
    return {name: text.encode() for name, text in texts.items()}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"--format {name}: unknown; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def read_published(storage: Storage, path: str, chosen: Format) -> tuple[Published, str]:
    """Return the tensors at a path and their folder, with the format's config and Hugging Face's image processor's."""
    file, folder = path, path.rstrip("/")
    if (inside := next((join(path, name) for name in WEIGHTS if storage.exists(join(path, name))), None)) is not None:
        file = inside
    else:
        folder = split(path)[0]
        try:
            storage.info(path)
        except StorageError as error:
            if not isinstance(error, NotFound) and not isinstance(error.__cause__, IsADirectoryError):
                raise
            raise CheckpointError(
                f"{path}: no such file, and no folder with {' or '.join(WEIGHTS)}; give a published checkpoint"
            ) from error
    if not file.endswith(".index.json"):
        published = read_tensors(storage.read(file), file)
    else:  # tensors of several files of the same folder, which an index of Hugging Face names
        files = read_json(storage.read(file), file).get("weight_map")
        names = list(files.values()) if isinstance(files, dict) else []
        plain = [n for n in names if isinstance(n, str) and re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]{1,255}", n)]
        if not isinstance(files, dict) or not names or plain != names:
            raise CheckpointError(f"{file}: expected a weight_map of tensors' names to files of the same folder")
        tensors: State = {}
        for name in sorted(set(plain)):
            url = join(folder, name)
            if not storage.exists(url):
                raise CheckpointError(f"{url}: is missing; {split(file)[1]} names it, so download the folder again")
            tensors |= read_tensors(storage.read(url), url).tensors
        if missing := sorted(files.keys() - tensors.keys()):
            raise CheckpointError(f"{file}: names {', '.join(missing[:4])}, which its files do not hold")
        published = Published(tensors)
    if not chosen.model_type:
        return published, folder
    processor = _json(storage, folder, PROCESSOR)
    if processor is None:  # newer transformers store all processors in one file
        image_processor = (_json(storage, folder, PROCESSORS) or {}).get("image_processor")
        processor = image_processor if isinstance(image_processor, dict) else None
    return replace(published, config=_json(storage, folder, chosen.config_file), processor=processor), folder


def _json(storage: Storage, folder: str, name: str) -> dict[str, Any] | None:
    url = join(folder, name)
    return read_json(storage.read(url), url) if storage.exists(url) else None


def _section(published: Published, chosen: Format, model: Path | None, overrides: Iterable[str]) -> TransformerConfig:
    """Return the model section of a checkpoint, with the sizes that `import_weights` describes."""
    defined: dict[str, Any] = {}
    with suppress(CheckpointError):  # others' files may have a header key of that name, too
        own = read_json(published.metadata.get(MODEL_KEY, "").encode(), "the file's header")
        defined = own if "kind" in own else {}
    if model is not None:
        defined = load_config(model).model.model_dump(mode="json")
    elif not defined and chosen.model_type:
        defined = chosen.section(published.config or {}, published.processor or {})
    for override in overrides:
        apply_override(defined, override)
    inferred = chosen.infer(published.tensors, defined)
    for key, theirs in chosen.sizes.items():
        size = (published.config or {}).get(theirs)
        if isinstance(size, int) and key in inferred and size != inferred[key]:
            raise ConfigError(
                f"config.json: {theirs} is {size}, the tensors have {inferred[key]}: it is another model's. "
                "Give the folder in which both were published, or the weights file alone"
            )
    section = _config("imported", inferred, {"images": ["mim"]}).model
    if chosen.kinds is not None and section.kind not in chosen.kinds:
        raise ConfigError(f"the format holds models of kind {', '.join(chosen.kinds)}, not {section.kind}")
    layers = max(value for key, value in section.model_dump().items() if key in ("layers", "text_layers"))
    if layers > len(published.tensors):
        raise CheckpointError(f"{layers} layers are claimed, and the file holds {len(published.tensors)} tensors")
    return section


def _config(
    out: str,
    section: dict[str, Any],
    uses: Mapping[SourceType, list[str]],
    heads: HeadConfig = HeadConfig(),
    tokenizer: Tokenizer | None = None,
    max_text_length: int = 1,
) -> RunConfig:
    """Return the config stored with imported weights in `out`: a stage for each source type in `uses`."""
    target: dict[str, Any] = {} if heads.image_target is None else {"image_target": heads.image_target}
    if heads.image_target == "visual_tokens":
        target["image_tokenizer"] = {"weights": NO_SOURCE, "tokens": heads.visual_tokens}
    stages = [
        {
            "name": f"imported_{source_type}",
            "sources": {source_type: 1.0},
            "objectives": {objective: {} for objective in objectives},
            "steps": 1,
            "global_batch_size": DataConfig().streams,
            "max_text_length": max_text_length,
            "negatives": "hard" if "itc" in objectives else "random",
            "num_classes": heads.classes,
            "num_answers": heads.answers,
            **target,
        }
        for source_type, objectives in (uses or {"images": ["mim"]}).items()
    ]
    output, _, name = out.rstrip("/").rpartition("/")
    values = {
        "name": name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) else "imported",
        "output": output or ".",
        "model": section,
        "sources": {source_type: {"shards": NO_SOURCE, "type": source_type} for source_type in USES},
        "stages": stages,
    }
    if tokenizer is not None and tokenizer.lowercase == tokenizer.is_cased:
        values["tokenizer"] = {"lowercase": tokenizer.lowercase}  # as stated next to the vocabulary
    return validate(values, "imported weights")


def _heads(state: State, patch_size: int, target: ImageTarget | None) -> HeadConfig:
    """Return the heads of weights of ours; without `target`, the masked-image head's is inferred from its outputs."""
    biases = ("mim_head.predict.bias", "classification_head.classify.bias", "vqa_head.classify.bias")
    outputs, classes, answers = (len(state.get(name, ())) for name in biases)
    known: dict[int, ImageTarget] = {COLOUR_CLASSES: "mean_colour", 3 * patch_size**2: "pixels"}
    image_target = None if not outputs else target or known.get(outputs, "visual_tokens")
    return HeadConfig(
        image_target=image_target,
        visual_tokens=outputs if image_target == "visual_tokens" else 0,
        classes=classes or None,
        answers=answers or None,
        nlvr2=any(name.startswith("nlvr2_head.") for name in state),
        ranking=any(name.startswith("ranking_head.") for name in state),
    )


def _tokenizer(storage: Storage, vocabulary: str | None, folder: str | None, num_words: int) -> Tokenizer:
    """Return the tokenizer, of `num_words` tokens, of the file `vocabulary` or else of a Hugging Face folder."""
    if vocabulary is not None:
        tokenizer, where = Tokenizer.load(storage, vocabulary), f"--vocabulary {vocabulary}"
    elif folder and storage.exists(join(folder, VOCABULARY)):
        tokenizer, where = Tokenizer.load(storage, join(folder, VOCABULARY)), f"the vocabulary in {folder}"
    elif folder and (content := _tokenizer_json(storage, folder)) is not None:
        where, model, normalizer = f"the vocabulary in {folder}", content.get("model"), content.get("normalizer")
        model = model if isinstance(model, dict) else {}
        numbers = model.get("vocab") if model.get("type", "WordPiece") in ("WordPiece", "BPE") else None
        is_numbered = isinstance(numbers, dict) and all(type(number) is int for number in numbers.values())
        tokens = {number: token for token, number in numbers.items()} if is_numbered and numbers else {}
        if not tokens or set(tokens) != set(range(len(tokens))):
            raise CheckpointError(
                f"{folder}: {TOKENIZER} or {BYTE_PAIRS} holds no WordPiece vocabulary and not CLIP's; name a vocab.txt "
                "with --vocabulary"
            )
        lowercase = stated_lowercase(storage, folder)
        if lowercase is None and isinstance(normalizer, dict) and isinstance(normalizer.get("lowercase"), bool):
            lowercase = normalizer["lowercase"]
        ordered = [tokens[number] for number in range(len(tokens))]
        tokenizer = Tokenizer(ordered, lowercase)
        if (merges := model.get("merges")) is not None:
            pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
            if not tokenizer.is_byte_pair or byte_pair_merges(ordered) != pairs:
                raise CheckpointError(f"{where}: its merges are not in the order of its tokens, as CLIP's are")
    else:
        raise ConfigError(
            f"the weights know {num_words} tokens, but not which; name the vocabulary file they were trained with, "
            "one token a line, with --vocabulary (published models: bert-base-uncased's vocab.txt, BEiT-3's beit3.spm)"
        )
    if tokenizer.is_unigram and tokenizer.size < num_words:  # BEiT-3 has 64,002 tokens, in a table of 64,010 rows
        unused = (f"<unused{number}>\t0.0" for number in range(num_words - tokenizer.size))
        tokenizer = Tokenizer([*tokenizer.lines, *unused])
    if tokenizer.size != num_words:
        raise ConfigError(f"{where}: has {tokenizer.size} tokens, the weights have {num_words}")
    return tokenizer


def _tokenizer_json(storage: Storage, folder: str) -> dict[str, Any] | None:
    """Return what a folder's tokenizer.json holds, or the same from vocab.json and merges.txt; None without both."""
    if (content := _json(storage, folder, TOKENIZER)) is not None or not storage.exists(join(folder, BYTE_PAIRS)):
        return content
    lines = storage.read(join(folder, MERGES)).decode().split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    return {"model": {"type": "BPE", "vocab": _json(storage, folder, BYTE_PAIRS), "merges": merges}}


def _choices(storage: Storage, published: Published, heads: HeadConfig, answers_file: str | None) -> dict[str, Choices]:
    """Return what the heads choose among, by file name: `answers_file`, else the file's own header, else id2label."""
    if answers_file is not None and heads.answers is None:
        raise ConfigError(f"--answers {answers_file}: these weights answer no questions; leave --answers out")
    labels = _numbered((published.config or {}).get("id2label")) or []
    if heads.nlvr2 and [label.lower() in ("true", "yes", "entailment", "1") for label in labels] == [True, False]:
        raise ConfigError(
            f"config.json: id2label says that 0 is {labels[0]!r}; in mome, statements are true at 1. Swap the labels "
            "and the two rows of classifier.3"
        )
    choices: dict[str, Choices] = {}
    for name, size in ((ANSWERS, heads.answers), (CLASSES, heads.classes)):
        if size is None:
            continue
        listed, where = None, "config.json: id2label"
        if name == ANSWERS and answers_file is not None:
            listed, where = _answers_in(storage, answers_file), f"--answers {answers_file}"
        elif name in published.metadata:
            listed, where = Choices.from_bytes(published.metadata[name].encode(), name), "the file's header"
        elif len(labels) == size and labels != [f"LABEL_{number}" for number in range(size)]:
            distinct: dict[str, None] = {}
            for number, label in enumerate(labels):  # ImageNet has two classes called "crane"
                distinct[label if label not in distinct else f"{label} ({number})"] = None
            if len(distinct) == size:
                listed = Choices.from_bytes(json.dumps(list(distinct)).encode(), where)
        if listed is None:
            log.warning("%s", UNNAMED[name] % size)
        elif len(listed) != size:
            raise ConfigError(
                f"{where}: names {len(listed)}, the head has {size} outputs; give the list that it was trained with"
            )
        else:
            choices[name] = listed
    return choices


def _answers_in(storage: Storage, url: str) -> Choices:
    """Read a JSON list, a JSON object of answers and their numbers (either way round), or one answer a line."""
    where = f"--answers {url}"
    try:
        text = storage.read(url).decode("utf-8-sig")
        is_json = text.lstrip()[:1] in ("[", "{")
        value = json.loads(text) if is_json else [x.removesuffix("\r") for x in text.split("\n") if x.strip()]
    except NotFound as error:
        raise ConfigError(f"{where}: no such file; give a JSON list of answers, or one answer a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is no UTF-8 text ({error}); give a JSON list of answers") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is no JSON ({error}); give a JSON list, or one answer a line") from error
    if isinstance(value, dict):
        by_number = {number: answer for answer, number in value.items() if isinstance(number, int | str)}
        value = _numbered(value) or _numbered(by_number)
    return Choices.from_bytes(json.dumps(value).encode(), where)


def _numbered(value: Any) -> list[str] | None:
    """Return the texts of an object that numbers them from 0, in order; None for anything else."""
    if not isinstance(value, dict) or not value or not all(isinstance(text, str) for text in value.values()):
        return None
    numbers = {str(number): text for number, text in value.items()}
    in_order = [numbers.get(str(number)) for number in range(len(value))]
    return None if None in in_order else [text for text in in_order if text is not None]
