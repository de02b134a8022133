"""Upper bounds of requirements have a reason, and sources are checked for the oldest Python that is named."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
UPPER = {"<", "<=", "==", "===", "~="}


def bounded(settings: str) -> Iterator[tuple[str, bool]]:
    """Requirements that refuse newer versions, each with whether a comment is on its line or on the line above."""
    parsed = tomllib.loads(settings)
    groups = [parsed["build-system"]["requires"], parsed["project"]["dependencies"]]
    groups += parsed["project"].get("optional-dependencies", {}).values()
    lines = ["", *settings.splitlines()]
    for text in (text for group in groups for text in group):
        if any(one.operator in UPPER for one in Requirement(text).specifier):
            number = next(i for i, line in enumerate(lines) if f'"{text}"' in line)
            yield text, lines[number - 1].lstrip().startswith("#") or bool(re.search(r"[\],]\s*#", lines[number]))


def test_every_upper_bound_has_a_reason() -> None:
    assert [text for text, is_explained in bounded(SETTINGS) if not is_explained] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('dependencies = ["a>=1"]', []),
        ('dependencies = ["a>=1,<2"]', [("a>=1,<2", False)]),
        ('dependencies = ["a~=1.0", "b==3"] # newer ones differ', [("a~=1.0", True), ("b==3", True)]),
        ('# newer ones differ\ndependencies = [\n  "a==1.*",\n]', [("a==1.*", False)]),
        ('dependencies = [\n  # newer ones differ\n  "a==1.*",\n]', [("a==1.*", True)]),
    ],
)
def test_a_bound_without_a_reason_is_found(line: str, expected: list[tuple[str, bool]]) -> None:
    settings = f'[build-system]\nrequires = ["setuptools>=77"]\n[project]\n{line}\n'
    assert list(bounded(settings)) == expected


def test_the_oldest_python_that_is_named_is_the_one_that_ruff_and_mypy_check_for() -> None:
    settings = tomllib.loads(SETTINGS)
    named = [
        found[1]
        for text in settings["project"]["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text))
    ]
    assert (
        settings["project"]["requires-python"] == f">={named[0]}"
        and settings["tool"]["mypy"]["python_version"] == named[0]
    )
    assert "target-version" not in settings["tool"]["ruff"]  # ruff takes it from requires-python
