"""Prompts for benchmarks: bundled sets, local files and the hub, as text that a base model can continue.

Fields read from a row, and the prompt made of them:

| dataset | fields | `text` | `category` |
|---|---|---|---|
| `trio` | the trio's held-out prompts | as it is | `maths`, `python`, `real` |
| `gsm8k` | `question` | `Question: {question}`, a new line, `Answer:` | `gsm8k` |
| `humaneval` | `prompt`, `task_id` | as it is: a signature and its docstring | `humaneval` |
| `mbpp` | `prompt` or `text`, `test` or `test_list`, `task_id` | a docstring of the task and its first test | `mbpp` |
| `mt-bench` | `turns` or `prompt`, `category`, `question_id` | first turn, framed as for gsm8k | eight, as `writing` |
| `spec-bench` | `turns`, `category`, `question_id` | first turn, framed as for gsm8k | as published, see below |
| JSON lines | `prompt` or `text` or `turns`; `category`, `id` | as it is, or its first turn | as given, or its name |
| a text file | one prompt per line; empty lines are skipped | as it is | its name |

JSON lines are files `.jsonl`, `.ndjson` or `.json`. Their fields `category` and `id` (or `prompt_id`, `task_id`,
`question_id`) are optional. Spec-Bench's tables
count its eight MT-Bench categories as one subtask; they are the category `multi-turn` here.
Sources and licences: twotower_spec/evaluation/data/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from importlib.resources import as_file, files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from twotower_spec.demo.trio import CATEGORIES, held_out_prompts
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.formats import FORMATS, Content, FieldError, Record, plain
from twotower_spec.reading import STDIN, check_text, holds_json_lines, is_directory, is_file, read_rows

BUNDLED = {
    "gsm8k": "gsm8k.jsonl.gz",
    "humaneval": "humaneval.jsonl.gz",
    "mbpp": "mbpp.jsonl.gz",
    "mt-bench": "mt_bench.jsonl.gz",
    "spec-bench": "spec_bench.jsonl.gz",
}
DATASETS = ("trio", *FORMATS)
NOT_BUNDLED = frozenset(("translation", "summarization", "qa", "rag"))
ID_FIELDS = ("prompt_id", "task_id", "question_id", "id")
HUB_ID = re.compile(r"(?P<path>\w[\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+)(?::(?P<split>[\w.-]+))?)?")


@dataclass(frozen=True)
class Prompt:
    """Prompt of a benchmark.

    Attributes:
        prompt_id: unique in its dataset and the same wherever the dataset was read from, as `mt-bench/81`.
        category: results are also reported by it.
        text: for models that continue text, in the frame of its dataset.
        turns: for chat models: what a user says, turn by turn, without frame or chat template.
    """

    prompt_id: str
    category: str
    text: str
    turns: tuple[str, ...]


def load_prompts(
    dataset: str | Path = "trio", categories: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Prompts in an order drawn by seed that takes the categories in turn.

    Each category is shuffled by itself and the order of a prompt depends on its id and the seed alone. So any `limit`
    is balanced over categories, a smaller limit gives the beginning of a larger one, and choosing categories leaves
    their prompts as they were.

    Args:
        dataset: a name of `DATASETS`; a file (`.jsonl`, `.txt`, either with `.gz`), `-` for standard input;
            `owner/name`, `owner/name:config` or `owner/name:config:split` of the Hugging Face hub, split `test` by
            default. A file or a hub dataset in the format of a named one is `gsm8k=FILE`, `mt-bench=owner/name` and so
            on; without that its prompts are taken as they are.
        categories: those wanted; all by default.
        limit: at most so many prompts, at least 1; all by default.
        seed: of the order.

    Raises:
        ArgumentError: an unknown dataset or category, an unreadable file, a row without a prompt, or a hub dataset
            where package `datasets` is not installed.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit {limit} leaves no prompts; use a number of at least 1, or none for all prompts")
    prompts = _read(dataset)
    if categories is not None:
        prompts = _of_categories(prompts, categories, str(dataset))
    return _in_turn(prompts, seed)[:limit]


def _in_turn(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    def draw(prompt: Prompt) -> bytes:
        return blake2b(f"{seed}:{prompt.prompt_id}".encode(), digest_size=8).digest()

    names = dict.fromkeys(prompt.category for prompt in prompts)
    columns = [sorted((p for p in prompts if p.category == name), key=draw) for name in names]
    return [prompt for prompt in chain.from_iterable(zip_longest(*columns)) if prompt is not None]


def _of_categories(prompts: Sequence[Prompt], categories: Sequence[str], dataset: str) -> list[Prompt]:
    known = dict.fromkeys(prompt.category for prompt in prompts)
    unknown = [name for name in categories if name not in known]
    if not categories or unknown:
        remedy = f"use one of: {', '.join(known)}"
        if _name(dataset) == "spec-bench" and not NOT_BUNDLED.isdisjoint(unknown):
            remedy = (
                "its text belongs to other publishers and is not in this package, so fetch "
                "data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench and use spec-bench=question.jsonl"
            )
        raise ArgumentError(f"dataset {dataset} has no category {', '.join(unknown) or '(none given)'}; {remedy}")
    return [prompt for prompt in prompts if prompt.category in categories]


def _read(dataset: str | Path) -> list[Prompt]:
    """All prompts of a dataset, in its own order."""
    spec = str(dataset)
    name = _name(spec)
    if name == "trio":
        return _trio()
    if name in BUNDLED:
        with as_file(files("twotower_spec.evaluation") / "data" / BUNDLED[name]) as path:
            return _prompts(_rows(path), name, FORMATS[name], spec)
    left, separator, source = spec.partition("=")
    name = _name(left)
    # A path may hold "=": only a known name before it is a format.
    if not separator or name not in FORMATS:
        name, source = "", spec
    rows, stem = _source(source)
    return _prompts(rows, name or stem, FORMATS.get(name, plain), spec)


def _name(dataset: str) -> str:
    """MT-Bench, mt_bench and mt-bench are the same dataset."""
    return dataset.lower().replace("_", "-")


def _source(source: str) -> tuple[Iterable[Record], str]:
    """Rows of a file or of a hub dataset, and the name of it."""
    path = Path(source)
    with suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path == STDIN:
        return _rows(path), "stdin"
    if is_file(path):
        return _rows(path), path.name.removesuffix(".gz").rpartition(".")[0]
    hub = HUB_ID.fullmatch(source)
    is_path = source.startswith((".", "/", "~")) or path.suffix in (".gz", ".txt") or holds_json_lines(path)
    is_path = is_path or is_directory(path)
    if hub and not is_path:
        return _hub_rows(source, hub["path"], hub["config"], hub["split"] or "test"), hub["path"]
    raise ArgumentError(
        f"{'no such file' if is_path else 'unknown dataset'}: {source}; use one of {', '.join(DATASETS)}, a .jsonl or "
        f".txt file, owner/name of the hub, or NAME=FILE for a file in the format of a named dataset"
    )


def _rows(path: Path) -> Iterator[Record]:
    """Rows of a file of JSON lines; lines of a text file as rows with a prompt.

    Raises:
        ArgumentError: another suffix, not UTF-8, or a line that is no JSON object.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if path != STDIN and suffix != ".txt" and not holds_json_lines(path):
        raise ArgumentError(f"{path} ends in {suffix or 'no suffix'}; use .jsonl or .txt, either with .gz after it")
    return (row for _, row in read_rows(path))


def _hub_rows(source: str, path: str, config: str | None, split: str) -> Iterator[Record]:
    try:
        # A folder called "datasets" in the working directory imports too, without the function.
        load_dataset: Any = import_module("datasets").load_dataset
    except (ImportError, AttributeError):
        raise ArgumentError(
            f"reading {source} from the hub needs package 'datasets', which is not installed; install it with "
            f"`pip install datasets`, or use one of {', '.join(DATASETS)} or a local .jsonl file"
        ) from None
    try:
        yield from load_dataset(path, config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ArgumentError(
            f"dataset {source} cannot be read from the hub ({reason}); check owner/name:config:split, or download "
            f"it and use its .jsonl file"
        ) from error


def _trio() -> list[Prompt]:
    return [
        Prompt(f"trio/{category}/{i}", category, row.prompt, (row.prompt,))
        for category in CATEGORIES
        for i, row in enumerate(held_out_prompts(category))
    ]


def _prompts(rows: Iterable[Record], name: str, content: Callable[[Record], Content], source: str) -> list[Prompt]:
    prompts: dict[str, Prompt] = {}
    for i, row in enumerate(rows):
        try:
            made = content(row)
        except FieldError as error:
            hint = f"; fields of a known dataset are read with NAME={source}" if content is plain else ""
            raise ArgumentError(
                f"row {i + 1} of {source} has no text in {error}, only the fields {', '.join(row)}; "
                f"rename a field{hint}"
            ) from None
        number = next((row[field] for field in ID_FIELDS if row.get(field) is not None), i)
        # HumanEval's own ids begin with its name.
        prompt_id = f"{name}/{str(number).removeprefix('HumanEval/')}"
        for text in (made.text, *made.turns, made.category or "", prompt_id):
            check_text(text, f"row {i + 1} of {source}")
        if prompt_id in prompts:
            raise ArgumentError(f"{source} has two prompts with id {number}; give each row an id of its own, or none")
        prompts[prompt_id] = Prompt(prompt_id, made.category or name, made.text, made.turns)
    if not prompts:
        raise ArgumentError(f"{source} has no prompts; use a file with at least one")
    return list(prompts.values())
