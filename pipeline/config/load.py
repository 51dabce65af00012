"""Loading of a `RunConfig` from YAML and `key=value` overrides, or as it was stored with a run or with weights."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.errors import ConfigError
from pipeline.config.keys import suggestion
from pipeline.config.redaction import redact, remember
from pipeline.config.schema import MODEL_SECTIONS, RunConfig, StorageConfig, parse_steps
from pipeline.config.urls import absolute, is_local, local_path

_MODEL_KINDS = [["model", kind] for kind in MODEL_SECTIONS]  # pydantic adds the kind, which is not a key, to paths
_ROOT = Path(__file__).resolve().parents[2]
_INSTALLED = _ROOT / "mome" / "configs"  # of the wheel (see setup.py)
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _ROOT / "configs"
_PART = re.compile(r'(?:^|\.)(?:"([^"]*)"|([^."]+))')
_OVERRIDE = re.compile(r'(?P<path>(?:"[^"]*"|[^="\s.]+)(?:\.(?:"[^"]*"|[^=".]+))*)=(?P<value>.*)', re.DOTALL)
# Stores that are accessed with the caller's own account. Any other URL names a host, and a request to it would reveal
# who reads a folder and when.
STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "hf", "memory"})

Changes = dict[str, tuple[Any, Any]]  # dotted path -> (old, new)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader for which `1e-4` is a number, `1:30` and `010` are strings (YAML 1.2), duplicate keys are errors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:  # `!!int x`, the date 2024-13-45
            kind, line = node.tag.rpartition(":")[2], node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(
                problem=f"line {line}: {str(node.value)[:100]!r} is not a valid {kind}; quote it to pass a string"
            ) from error

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"line {line}: a key is a {key_node.id}; quote values that start with a brace or bracket"
                )
            if key_node.tag != f"{_TAG}merge":  # `<<: *base` may repeat keys of the mapping
                key_node.tag = f"{_TAG}str"  # a key such as 2017, on or null is a string too
                if key_node.value in keys:
                    raise yaml.constructor.ConstructorError(problem=f"duplicate key '{key_node.value}' in line {line}")
                keys.add(key_node.value)
        return node


_TAG = "tag:yaml.org,2002:"
_NUMBERS = {
    f"{_TAG}int": r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)\Z",
    f"{_TAG}float": r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?\Z
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+\Z
        |[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z""",
}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_form, re.VERBOSE), list("-+.0123456789"))


def find_config(path: str | Path) -> tuple[Path, str]:
    """Return the file of a config and its name in messages: the file at `path` or, without one, the recipe so named.

    `demo`, `configs/demo.yaml` and `finetune/vilt_b32_vqa` are names of recipes wherever the package is installed.
    Raises ConfigError with what is similar if there is neither.
    """
    path = Path(path)
    if os.path.isdir(path) or not os.path.exists(path):
        name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
        recipes = {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in RECIPES.rglob("*.yaml")}
        if name in recipes:
            return recipes[name], f"recipe {name}"
        files = {str(file): file for file in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
        close = difflib.get_close_matches(str(path), files, 1) + difflib.get_close_matches(name, recipes, 1)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        fault = "a folder, and no recipe has this name" if os.path.isdir(path) else "no such file, and no such recipe"
        raise ConfigError(
            f"{path}: {fault}; {hint}`mome config list` shows the recipes, `mome config new` writes a config"
        )
    return path, str(path)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file or a recipe, apply dotted overrides and validate; a ConfigError lists every fault by its key."""
    path, origin = find_config(path)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{origin}: cannot be read ({reason}); pass the path of a YAML config") from error
    values = parse_yaml(content, origin)
    if not isinstance(values, dict):
        kind = "it is empty" if values is None else f"it is a {type(values).__name__}"
        remedy = "expected a mapping of keys; `mome config copy demo` prints an example, `mome config new` writes one"
        raise ConfigError(f"{origin}: {kind}; {remedy}")
    for override in overrides:
        apply_override(values, override)
    return validate(values, origin)


def validate(values: dict[str, Any], origin: str) -> RunConfig:
    """Validate plain values; `origin` starts the error message. Strict pydantic takes lists as tuples only in JSON."""
    try:
        text = json.dumps(values, default=str, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        excerpt = error.object[max(0, error.start - 20) : error.end + 20]
        raise ConfigError(f"{origin}: not valid Unicode near {excerpt!r}; write an emoji as one character") from error
    except (ValueError, RecursionError) as error:
        if "digits" in str(error):
            raise ConfigError(f"{origin}: a number has too many digits") from error
        raise ConfigError(f"{origin}: a value contains itself (an anchor inside its own value)") from error
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        lines, faults = [], error.errors()
        for fault in faults:
            kind, given, at = fault["type"], fault["input"], fault["loc"]
            # A tuple is also reported as too short if its items failed.
            if kind == "too_short" and any(at == other["loc"][: len(at)] != other["loc"] for other in faults):
                continue
            location = [str(part) for part in at if part != "[key]"]
            shown = list(location)
            if location[:2] in _MODEL_KINDS:
                del shown[1]
            elif re.match(r"stages\.[0-9]", ".".join(location)) and location[2:] != ["name"]:
                names = [stage.get("name") if isinstance(stage, dict) else None for stage in values["stages"]]
                name = names[int(location[1])]
                if isinstance(name, str) and name and names.count(name) == 1:
                    shown[1] = name
            path, message = ".".join(shown), fault["msg"].removeprefix("Value error, ")
            if kind == "extra_forbidden":
                known = list(_walk(location[:-1])[1])
                similar = suggestion(shown, [*flatten(given)] if isinstance(given, dict) else [], known, values)
                message = f"unknown key; {similar or 'known: ' + ', '.join(known)}"
            elif kind == "union_tag_invalid":
                message = f"expected {fault['ctx']['expected_tags']} (got {given['kind']!r:.200})"
                path += ".kind"
            elif kind == "missing":
                message = "required key is missing"
                if shown[0] == "sources" and len(shown) > 2:  # an override with a misspelt name starts a new source
                    others = [str(name) for name in values["sources"] if str(name) != shown[1]]
                    close = difflib.get_close_matches(shown[1], others, n=1)
                    message += f"; did you mean the source '{close[0]}'?" if close else ""
            elif kind == "string_pattern_mismatch":
                pattern, valid = fault["ctx"]["pattern"], re.sub(r"[^A-Za-z0-9_.-]+", "_", str(given)).strip("_.-")
                hint = next((f"; did you mean '{n}'?" for n in (valid, valid.lower()) if re.search(pattern, n)), "")
                expected = (_walk(location)[0][-1].description or "").partition(": ")[2]
                message = f"expected {expected} (got {given!r}){hint}"
            elif kind != "value_error" and not isinstance(given, dict):
                choices = re.findall(r"'([^']+)'", fault["ctx"]["expected"]) if kind == "literal_error" else []
                close = difflib.get_close_matches(str(given), choices, n=1)
                message += f" (got {given!r})" + (f"; did you mean '{close[0]}'?" if close else "")
            lines += (f"{path}: {message}" if path else message).splitlines()
        count = "one fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise ConfigError(f"{origin}: {count}\n" + "\n".join(lines)) from None


def _walk(location: list[str]) -> tuple[list[FieldInfo], dict[str, FieldInfo]]:
    """Follow a path through the schema; return the fields on it, and the fields of the section where it ends."""
    model: Any = RunConfig
    on_path: list[FieldInfo] = []
    for index, part in enumerate(location):
        if part in (fields := _fields(model)):
            on_path.append(fields[part])
            model = fields[part].annotation
        elif location[: index + 1] in _MODEL_KINDS:
            model = MODEL_SECTIONS[part]
        elif get_origin(model) is dict and not part.isdigit():  # a key of a free-form mapping, such as a source's name
            model = get_args(model)[1]
    return on_path, _fields(model)


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """Return the fields of the section in an annotation such as tuple[StageConfig, ...] or X | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    inner = () if get_origin(annotation) is dict else get_args(annotation)
    return next((fields for part in inner if (fields := _fields(part))), {})


def resolve_secret(reference: str | None) -> str | None:
    """Return the value of `env:NAME` or `file:PATH`, stripped of whitespace; it is never stored or logged."""
    if reference is None:
        return None
    kind, _, name = reference.partition(":")
    secret, fault = "", ""
    try:
        secret = os.environ[name] if kind == "env" else Path(name).expanduser().read_text(encoding="utf-8-sig")
        secret = secret.strip()  # files end in a newline, values of a Windows env file in \r
        if not secret:
            fault = "it is empty"
        elif not secret.isprintable():
            fault = "it contains a line break or another control character, which HTTP headers cannot carry; give the "
            fault += "value alone, on one line"
    except KeyError:
        fault = f"the environment variable {name} is not set"
    except UnicodeDecodeError:
        fault = "the file is not UTF-8 text"
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; an unknown home
        fault = f"the file cannot be read ({error})"
    remember(secret)
    if fault:
        raise ConfigError(f"secret '{reference}': {fault}")
    return secret


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping from dotted paths to leaves."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def changes(old: RunConfig, new: RunConfig) -> tuple[Changes, Changes]:
    """Return the keys that differ between two configs, as (allowed, refused) on resume: path -> (old, new)."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    paths = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    different = {path: (before.get(path), after.get(path)) for path in paths}
    allowed = {path: values for path, values in different.items() if is_changeable(path)}
    return allowed, {path: values for path, values in different.items() if path not in allowed}


def is_changeable(path: str) -> bool:
    """Return True if the key at a dotted path may differ on resume."""
    extras = (field.json_schema_extra for field in _walk(path.split("."))[0])
    return any(isinstance(extra, dict) and extra.get("changeable") for extra in extras)


def local_paths(config: RunConfig) -> dict[tuple[str | int, ...], str]:
    """Return the value of every key that names a local file or folder, by the key's parts: a name may contain dots."""
    places: dict[tuple[str | int, ...], str | None] = {("output",): config.output}
    places["tokenizer", "vocabulary"] = config.tokenizer.vocabulary
    for name, source in config.sources.items():
        places["sources", name, "shards"] = source.shards
        places["sources", name, "opt_out"] = source.opt_out
    for index, stage in enumerate(config.stages):
        if stage.start_from not in ("previous", "random"):
            places["stages", index, "start_from"] = stage.start_from
        places["stages", index, "answer_list"] = stage.answer_list
        if stage.image_tokenizer is not None:
            places["stages", index, "image_tokenizer", "weights"] = stage.image_tokenizer.weights
    return {key: value for key, value in places.items() if value is not None and is_local(value)}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute local paths: a rank may have another working folder than the driver."""
    values = config.model_dump(mode="json", exclude_unset=True)
    places = local_paths(config)
    if config.data.cache.folder is not None:  # on each node's own disk, so not among the shared places
        places["data", "cache", "folder"] = config.data.cache.folder
    for (*parents, last), value in places.items():
        target: Any = values
        for part in parents:
            target = target[part] if isinstance(part, int) else target.setdefault(part, {})
        target[last] = str(local_path(value))
    return validate(values, config.name)


def parse_yaml(content: str | bytes, origin: str) -> Any:
    """Parse YAML; bytes may be UTF-8 or, with a byte order mark, UTF-16."""
    try:
        return yaml.load(content, Loader=_StrictLoader)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{origin}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # or an invalid date or number
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        reason = re.sub(r'in "<\w+ string>", ', "in ", reason)
        reason += ". Indent with spaces, not with tabs" if "'\\t'" in reason else ""
        raise ConfigError(f"{origin}: not valid YAML: {reason}") from error


def profile_override(window: str) -> str:
    """Return `--profile A:B` as an override of the config. Raises ConfigError."""
    try:
        first, last = parse_steps(window)
    except ValueError as error:
        raise ConfigError(f"--profile {window}: {error}, over all stages") from None
    return f'tracking.profile="{first}:{last}"'  # quoted: YAML 1.1 reads a bare 3:6 as minutes and seconds


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in plain values. Raises ConfigError for a path that leads nowhere.

    A key that contains a dot is recognized if the config has it; `"…"` quotes any other, or one that contains `=`.
    """
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"override '{override}': expected key=value, such as stages.vision.steps=100")
    target: Any = values
    rest = [quoted or plain for quoted, plain in _PART.findall(match["path"])]
    while True:
        size = 1
        if isinstance(target, dict):  # a key may itself contain dots, as in `sources.coco.2017.type`
            size = next((n for n in range(len(rest), 1, -1) if ".".join(rest[:n]) in target), 1)
        part, rest = ".".join(rest[:size]), rest[size:]
        key: Any = part
        if isinstance(target, list):  # an element is given by number or by its `name`
            names = [item.get("name") if isinstance(item, dict) else None for item in target]
            numbers = [str(index) for index in range(len(target))]
            if part not in names and part not in numbers:
                known = ", ".join(n if name is None else str(name) for n, name in zip(numbers, names, strict=True))
                close = difflib.get_close_matches(part, [str(name) for name in names], n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise ConfigError(f"override '{override}': no element '{part}'; there are {known or 'none'}{hint}")
            key = names.index(part) if part in names else numbers.index(part)
        if not rest:
            target[key] = parse_yaml(match["value"], f"override '{override}'")
            return
        if (isinstance(target, dict) and key not in target) or target[key] is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict | list):
            raise ConfigError(f"override '{override}': '{part}' is a value, not a section")


# ---- configs stored with runs and weights, which may come from an untrusted author


class RecordedLocation(NamedTuple):
    """The run folder and tracking URI recorded in a stored config; for display and comparison only."""

    folder: str
    tracking_uri: str | None


def parse_config(data: Any, where: str) -> RunConfig:
    """Return the config that `mome` wrote at `where`, without passwords, for display only. Raises ConfigError."""
    try:
        values = json.loads(data if isinstance(data, bytes | str) else json.dumps(data))
        for section, key in (("tracking", "uri"), ("storage", "endpoint_url")):
            keys = values.get(section) if isinstance(values, dict) else None
            if isinstance(keys, dict) and isinstance(keys.get(key), str):
                keys[key] = redact(keys[key])  # the schema refuses user names and passwords
        return RunConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(
            f"{where}: not a config of this version ({error.error_count()} faults, the first: "
            f"{error.errors()[0]['msg']}); read it with the version that wrote it, or choose another run `name`"
        ) from None
    except Exception as error:  # a damaged config may break the validators themselves
        raise ConfigError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def stored_config(values: Any, where: str, folder: str) -> tuple[RunConfig, RecordedLocation]:
    """Return the config stored in `folder` in a form that is safe to act on, and its recorded locations.

    A stored config describes what was trained and on which data; it must not decide which hosts this machine contacts,
    which secrets it sends or where it writes. The run's folder becomes `folder`, wherever it was written. Endpoints,
    secrets, MLflow and Ray addresses are those of the environment; of the storage section only the retry timeout is
    kept. Raises ConfigError as `parse_config`. Use no other function to act on a stored config.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is damaged: expected a config, got {type(values).__name__}")
    config = parse_config(values, where)
    recorded = RecordedLocation(config.folder, config.tracking.uri)
    output, _, name = absolute(folder.rstrip("/") or "/").rpartition("/")
    safe = {
        "output": output or "/", "name": name or config.name,
        "storage": StorageConfig(retry_timeout_seconds=config.storage.retry_timeout_seconds),
        "tracking": config.tracking.model_copy(update={"uri": None}),
        "cluster": config.cluster.model_copy(update={"address": None}),
    }  # fmt: skip
    return config.model_copy(update=safe), recorded


def check_stored_url(url: str, key: str) -> None:
    """Raise ConfigError for a URL of a stored config that names a host to contact, or chains another URL."""
    if "::" in url or not (is_local(url) or url.partition("://")[0] in STORES):
        raise ConfigError(
            f"{key}: {url}: a stored config must not make this machine contact another host; pass the URL yourself "
            "with --source"
        )
