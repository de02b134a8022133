"""Privacy of requests: what they hold stands in no log, metric or file of ours, even where a fault names it."""

import re
from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.installed import samples_on_a_cpu
from tests.vllm_plugin.scenarios import SECRET
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

WORDS = [word for word in re.findall(r"\w+", SECRET) if len(word) > 7]


@pytest.fixture(scope="module", params=[run_engine, run_v2_engine], ids=["V1", "V2"])
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    drafter = two_tower(8, policy="fixed", block_size=8, log_interval_s=0.01)
    found = request.param(["secret_prompts"], drafter, **ROOMY)
    return {**found["secret_prompts"], "log": found["log"]}


def told(text: str, engine: dict[str, Any]) -> list[str]:
    """Words of the secret, and four tokens in a row of a prompt or answer, that a text holds."""
    numbers = [int(found) for found in re.findall(r"\d+", text)]
    printed = {tuple(numbers[i : i + 4]) for i in range(len(numbers))}
    rows = [*engine["prompts"], *engine["answers"]]
    # A single token many times is no text of anybody, and may be a row of zeros.
    told = {row for ids in rows for i in range(len(ids) - 3) if len(set(row := tuple(ids[i : i + 4]))) > 1}
    return [word for word in WORDS if word in text] + [str(row) for row in printed & told]


def test_what_would_be_told_is_found(engine: dict[str, Any]) -> None:
    assert len(WORDS) == 5 and told(SECRET, engine) == WORDS
    for ids in (engine["prompts"][1], engine["answers"][1]):
        assert told(f"cannot read {ids[5:12]}", engine)


def test_faults_that_name_tokens_are_logged_without_them(engine: dict[str, Any]) -> None:
    said = "\n".join(engine["records"])
    assert told(said, engine) == []
    assert told(engine["log"], engine) == []
    for kind in ("LookupError", "ValueError", "BufferError", "ArithmeticError"):
        assert f"({kind}: " in said and f"{kind}: " in engine["log"], kind
    if samples_on_a_cpu():
        assert "vLLM's own took over" in said
    assert "was given" in said and "cannot forget [...]" in said
    assert "TwoTower metrics" in said


def test_metrics_and_files_hold_numbers_of_the_drafter_alone(engine: dict[str, Any]) -> None:
    assert "vllm:twotower_rounds_total" in engine["metrics"]
    assert told(engine["metrics"], engine) == []
    assert len(engine["files"]) >= 5  # two names, what is in them, and it as numbers
    for text in engine["files"]:
        assert told(text, engine) == []
