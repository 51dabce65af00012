"""What a converter says when a checkpoint's tensors are not those of the model: every name, in three lists."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from pipeline.config.errors import CheckpointError

Shape = tuple[int, ...]


def require(state: Mapping[str, Tensor], wanted: Mapping[str, Shape], allowed: Collection[str] = ()) -> set[str]:
    """The wanted names that the state has in their shapes: all of them, but for what `allowed` excuses.

    `allowed` are names or patterns (`vqa_classifier.*`); a name that matches may be missing, unexpected or of another
    shape, and is then left out. Raises CheckpointError listing every other fault.
    """
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    wrong = [name for name, shape in wanted.items() if name in state and tuple(state[name].shape) != shape]
    faults = {
        "missing": excused(missing, allowed),
        "unexpected": excused(unexpected, allowed),
        "wrong shape": [
            f"{name} (is {tuple(state[name].shape)}, must be {wanted[name]})" for name in excused(wrong, allowed)
        ],
    }
    if any(faults.values()):
        lines = [f"  {kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names]
        message = "the checkpoint does not fit the model; compare its sizes with the config's model section"
        raise CheckpointError("\n".join([message, *lines]))
    return set(wanted) - set(missing) - set(wrong)


def excused(names: Iterable[str], allowed: Collection[str]) -> list[str]:
    """The names that no pattern excuses."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]
