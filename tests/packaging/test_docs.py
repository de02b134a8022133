"""Checks that what the documentation names is there: links, files, modules, names in snippets, commands, options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from twotower_spec.cli.app import build_app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES = {
    "twotower_spec": ROOT,
    "twotower_kernels": ROOT / "kernels",
    "vllm_twotower": ROOT / "vllm_plugin",
    "twotower_bench": ROOT / "benchmarks",
}
FOLDERS = ("benchmarks", "docs", "examples", "kernels", "tests", "twotower_spec", "vllm_plugin")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every block between fences; indented ones have no language."""
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from (("", block) for block in re.findall(r"(?:^    .*\n)+", rest, flags=re.M))


def spans(page: Path) -> list[str]:
    """Everything between single backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of every line of a shell block and of every span that may be a command."""
    blocks = [block for language, block in code_blocks(page) if language in ("", "sh", "bash")]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(page)]:
        if re.search(r"(^|[ =])(twotower-spec|python|make) ", line):
            for part in re.split(r" && | \|\| |; ", re.sub(r"\s#.*", "", line)):
                try:
                    yield shlex.split(part)
                except ValueError:  # prose with an apostrophe
                    continue


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@cache
def options_of(*words: str) -> frozenset[str] | None:
    """Options of the command that the words begin with, None where its arguments are another program's."""
    command = typer.main.get_command(build_app())
    for word in words:
        if not hasattr(command, "commands"):
            break
        assert word in command.commands, f"there is no command {word!r} in {words}"
        command = command.commands[word]
    if command.context_settings.get("ignore_unknown_options"):
        return None
    return frozenset(name for one in command.params for name in (*one.opts, *one.secondary_opts)) | {"--help"}


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{file.name} has no heading #{anchor}"


@pages
def test_every_file_that_is_named_exists(page: Path) -> None:
    for span in spans(page):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", span):
            continue
        first = span.split("/")[0]
        if first in PACKAGES or first in FOLDERS:
            assert (PACKAGES.get(first, ROOT) / span).exists() or (ROOT / span).exists(), f"{span} is not there"


@pages
def test_every_module_and_name_of_ours_can_be_had(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"\w+(\.\w+)+", span) and span.split(".")[0] in PACKAGES:
            module, _, name = span.rpartition(".")
            assert find_spec(span) or hasattr(import_module(module), name), f"{span} is not there"


@pages
def test_snippets_import_what_there_is(page: Path) -> None:
    for language, block in code_blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                module = import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pages
def test_commands_have_the_options_that_they_are_shown_with(page: Path) -> None:
    for words in command_lines(page):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["twotower-spec"]:
            known = options_of(*(word for word in words[1:3] if re.fullmatch(r"[a-z-]+", word)))
            given = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", word)}
            assert known is None or given <= known, f"{sorted(given - known)} of {' '.join(words)}"
        elif words[:2] == ["python", "-m"]:
            assert words[2].split(".")[0] not in {*PACKAGES, "benchmarks"} or find_spec(words[2]), words
        elif words[:1] == ["make"] and len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]):
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), words
