"""JSON lines and recipes, as nobody should have written them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.inputs import HOSTILE_NUMBERS, as_json, changed, damaged, texts
from tests.fuzz.refusal import fuzzed, refuses_or_takes, taken_or_refused
from twotower_spec.cli.output import ResumableOutput
from twotower_spec.cli.prompts import read_prompts
from twotower_spec.evaluation import load_prompts
from twotower_spec.generation.batch import parse_prompts
from twotower_spec.training.recipe import load_recipe

PROMPT = {"prompt": "One and two", "category": "maths", "id": 7, "turns": ["One", "two"], "token_ids": [6, 9, 17]}
RESULT = {"index": 0, "token_ids": [1, 2], "text": "x", "run": "abcdef123456"}
RECIPE = (files("twotower_spec.training") / "data" / "trio.toml").read_bytes()


def lines(row: dict[str, object]) -> st.SearchStrategy[bytes]:
    """A row with changed values between two right ones, or the three of them damaged."""
    right = as_json(row) + b"\n"
    return changed(row).map(lambda one: right + as_json(one) + b"\n" + right) | damaged(3 * right)


@fuzzed()
@given(lines(PROMPT), st.sampled_from(("p.jsonl", "p.ndjson", "p.txt", "p.jsonl.gz")))
def test_prompt_file(tmp_path: Path, content: bytes, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with taken_or_refused():
        parse_prompts([prompt.token_ids or [1] for prompt in read_prompts([], [], file)], 256)


@fuzzed()
@given(lines(PROMPT), st.sampled_from(("", "gsm8k=", "mt-bench=", "humaneval=", "mbpp=", "spec-bench=")))
def test_dataset(tmp_path: Path, content: bytes, form: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    refuses_or_takes(load_prompts, f"{form}{file}")


@fuzzed()
@given(lines(RESULT))
def test_output_of_a_stopped_run(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(content)
    with taken_or_refused(), ResumableOutput(file, RESULT["run"]) as output:
        assert all(isinstance(index, int) for index in output.done)


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """The bundled recipe with values replaced, or damaged."""
    found = RECIPE.split(b"\n")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(found) - 1))
        name, equals, _ = found[place].partition(b"=")
        number = st.sampled_from(HOSTILE_NUMBERS).map(repr)
        value = draw(number | texts.map(lambda text: as_json(text).decode()) | st.sampled_from(("[]", "{}", "true")))
        found[place] = name + equals + value.encode() if equals else draw(damaged(found[place]))
    return b"\n".join(found)


@fuzzed()
@given(recipes() | damaged(RECIPE))
def test_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    refuses_or_takes(load_recipe, file)
