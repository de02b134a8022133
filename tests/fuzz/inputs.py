"""Strategies: what a file or a command line may hold that nobody has thought of, mostly near what is right."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

HOSTILE_TEXT = (
    "",
    " ",
    "[/x]",
    "[bold]",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "nan",
    "-1",
    "é" * 300,
    "x" * 20_000,
    "a/b",
    "a\nb",
    "$x^$",
    "%s{0}",
)
HOSTILE_NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
)
# Text that no writer of JSON makes; `NESTED` is too deep for recursion.
HOSTILE_BYTES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\ud800",
    b"\\",
    b"-",
    b"1e999",
    b"NaN",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"null",
)

texts = st.sampled_from(HOSTILE_TEXT) | st.text(st.characters(), max_size=8)
numbers = st.sampled_from(HOSTILE_NUMBERS) | st.integers(-10, 10) | st.floats()
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)


def as_json(value: Any) -> bytes:
    """JSON with escapes, so that lone surrogates can be in it."""
    return json.dumps(value).encode("ascii")


@st.composite
def changed(draw: st.DrawFn, right: Any, replacements: st.SearchStrategy[Any] = values) -> Any:
    """A right value of JSON with one to three places changed: replaced, left out, doubled, or something new beside."""
    value = copy.deepcopy(right)
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value, replacements)
    return value


def _changed(draw: st.DrawFn, value: Any, replacements: st.SearchStrategy[Any]) -> Any:
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        how = draw(st.sampled_from(("deeper", "deeper", "deeper", "drop", "add")))
        if how == "deeper":
            value[place] = _changed(draw, value[place], replacements)
        elif how == "drop":
            del value[place]
        elif isinstance(value, dict):
            value[draw(texts)] = draw(replacements)
        else:
            value.insert(place, draw(replacements))
        return value
    return draw(replacements)


@st.composite
def damaged(draw: st.DrawFn, right: bytes) -> bytes:
    """A right file with one to three pieces cut out, doubled, overwritten, or put in."""
    content = right
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.sampled_from((0, 1, 2, 8, 100, 10_000))))
        piece = draw(st.sampled_from((*HOSTILE_BYTES, content[begin:end] * 2)) | st.binary(max_size=4))
        content = content[:begin] + piece + content[end:]
    return content
