"""How a row of each dataset becomes a prompt; the table in datasets.py says it in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

MT_BENCH_CATEGORIES = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True)
class Content:
    """Text, turns and category of a prompt, see `Prompt`; the category is None where its dataset has none."""

    text: str
    turns: tuple[str, ...]
    category: str | None = None


class FieldError(Exception):
    """None of the fields named holds what is needed."""


def _text(row: Record, *fields: str) -> str:
    for field in fields:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            return value
    raise FieldError(" or ".join(fields))


def _texts(row: Record, *fields: str) -> tuple[str, ...]:
    for field in fields:
        value = row.get(field)
        if isinstance(value, list) and value and all(isinstance(item, str) and item.strip() for item in value):
            return tuple(value)
    raise FieldError(" or ".join(fields))


def _category(row: Record) -> str | None:
    value = row.get("category")
    return None if value is None else str(value)


def _framed(question: str) -> str:
    """The frame of the trio's training text and of lm-eval's task gsm8k."""
    return f"Question: {question}\nAnswer:"


def _gsm8k(row: Record) -> Content:
    question = _text(row, "question")
    return Content(_framed(question), (question,))


def _humaneval(row: Record) -> Content:
    prompt = _text(row, "prompt")
    return Content(prompt, (prompt,))


def _mbpp(row: Record) -> Content:
    """The task and one test, which fixes the function's name, in a docstring.

    Source: Fried et al., InCoder (arXiv:2204.05999), as in the BigCode evaluation harness.
    """
    task = _text(row, "prompt", "text")
    test = _texts(row, "test", "test_list")[0]
    return Content(f'"""\n{task}\n{test}\n"""\n', (f"{task}\nYour code should pass this test:\n{test}",))


def _mt_bench(row: Record) -> Content:
    turns = _texts(row, "turns", "prompt")
    return Content(_framed(turns[0]), turns, _category(row))


def _spec_bench(row: Record) -> Content:
    turns, category = _texts(row, "turns"), _category(row)
    return Content(_framed(turns[0]), turns, "multi-turn" if category in MT_BENCH_CATEGORIES else category)


def plain(row: Record) -> Content:
    try:
        turns: tuple[str, ...] = (_text(row, "prompt", "text"),)
    except FieldError:
        try:
            turns = _texts(row, "turns")
        except FieldError:
            raise FieldError("prompt or text or turns") from None
    return Content(turns[0], turns, _category(row))


FORMATS: dict[str, Callable[[Record], Content]] = {
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "mt-bench": _mt_bench,
    "spec-bench": _spec_bench,
}
