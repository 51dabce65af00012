"""The Dockerfile copies existing files, runs unprivileged and installs the tested versions."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

from tests.support.rendered_infra import INFRA, ROOT, pins

DOCKERFILE = INFRA / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return (INSTRUCTION, arguments) with continued lines joined and comments removed."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.strip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    by_name: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            by_name[rest.split(" AS ")[1]] = []
        if by_name:
            by_name[list(by_name)[-1]].append((word, rest))
    return by_name


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_instructions_are_valid_and_the_final_image_contains_no_build_stage() -> None:
    assert {word for word, _ in instructions()} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert list(stages()) == ["build", "run"]
    assert ("COPY", "--from=build /opt/mome /opt/mome") in stages()["run"]


def test_the_base_image_is_pinned_and_has_the_required_python() -> None:
    ((_, base),) = [each for each in instructions() if each[0] == "ARG"]
    version = re.fullmatch(r"PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert version
    assert PYPROJECT["tool"]["mypy"]["python_version"] == version[1]
    assert [rest.split()[0] for word, rest in instructions() if word == "FROM"] == ["${PYTHON_IMAGE}"] * 2


def test_the_user_matches_the_manifests() -> None:
    run = stages()["run"]
    users = [rest for word, rest in run if word == "USER"]
    assert users == ["1000:1000"]
    after = run[run.index(("USER", "1000:1000")) :]
    assert "CMD" in [word for word, _ in after]
    assert "--uid 1000 --gid mome --create-home" in " ".join(rest for word, rest in run if word == "RUN")


COPIED = [
    source
    for word, rest in instructions()
    if word == "COPY" and not rest.startswith("--from")
    for source in rest.split()[:-1]
]


def test_only_copied_files_are_sent_to_the_builder() -> None:
    def is_ignored(path: Path) -> bool:
        """Apply Docker's rule: the last pattern that matches the path or a parent folder decides."""
        result = False
        for line in (ROOT / ".dockerignore").read_text().splitlines():
            if line and not line.startswith("#"):
                pattern = line.removeprefix("!")
                if any(fnmatch.fnmatch(str(part), pattern) for part in (path, *path.parents[:-1])):
                    result = not line.startswith("!")
        return result

    assert {"pipeline", "jobs", "configs", "setup.py"} <= set(COPIED)
    assert [source for source in COPIED if not (ROOT / source).exists() or is_ignored(Path(source))] == []
    others = [".git", ".venv", "runs/demo", "infra/compose.env", "settings.env", "tests"]
    assert [path for path in others if not is_ignored(Path(path))] == []


def test_locked_packages_have_hashes_and_tested_versions() -> None:
    locked: dict[str, int] = {}
    name = ""
    for line in (INFRA / "requirements.lock").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^ ;]+)", line):
            name = f"{match[1].lower()}=={match[2]}"
            locked[name] = 0
        elif line and not line.startswith("#"):
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
            locked[name] += 1
    assert all(locked.values())
    assert ("RUN", "pip install --require-hashes --no-deps --requirement infra/requirements.lock") in stages()["build"]
    ours = {re.split(r"[\[>=]", each)[0].lower() for each in PYPROJECT["project"]["dependencies"]} | {"ray"}
    assert {f"{name}=={version}".lower() for name, version in pins().items() if name.lower() in ours} <= set(locked)
    lines = (INFRA / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if line and line[0] != "#"} <= set(locked)


def test_other_packages_are_pinned_and_compatible() -> None:
    lines = [line for line in (INFRA / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    extra = dict(line.split("==") for line in lines)
    assert extra["boto3"] == pins()["botocore"]  # released together, with requirements on each other's version


def test_login_shells_find_the_commands() -> None:
    """Ray's launcher uses login shells, in which Debian resets PATH."""
    (command,) = [rest for _, rest in stages()["run"] if "/etc/profile.d/mome.sh" in rest]
    (path,) = re.findall(r"export PATH=([^']+)'", command)
    assert any(word == "ENV" and f"PATH={path}" in rest for word, rest in stages()["run"])


def test_code_run_during_the_build_exists() -> None:
    (command,) = [rest for _, rest in stages()["run"] if rest.startswith("python -c")]
    (module, name) = re.search(r"from (\S+) import (\w+)", command).groups()
    assert f"def {name}()" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
