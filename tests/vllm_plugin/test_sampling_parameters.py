"""Every field that vLLM's requests and steps have is answered for, and the answers hold."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.fork_server import TESTED_VERSION
from tests.vllm_plugin.installed import fields_of
from twotower_spec.errors import ArgumentError
from vllm_twotower.sampling_parameters import (
    OF_REQUESTS,
    OF_STEPS,
    Handling,
    allows_drafts,
    check_logits_processors,
    names,
)

needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

TABLES = [
    ("vllm/sampling_params.py", "SamplingParams", OF_REQUESTS),
    ("vllm/v1/sample/metadata.py", "SamplingMetadata", OF_STEPS),
]


@needs_vllm
@pytest.mark.parametrize(("file", "owner", "table"), TABLES)
def test_the_fields_of_are_those_of_the_table_each_in_one_place(
    file: str, owner: str, table: dict[Handling, str]
) -> None:
    fields = fields_of(file, owner)
    assert len(set(names(table))) == len(names(table)) and set(fields) <= set(names(table))
    if TESTED_VERSION not in os.environ:  # older ones have fewer
        assert sorted(names(table)) == sorted(fields)


def test_a_request_with_a_thinking_budget_gets_no_drafts() -> None:
    assert allows_drafts(SimpleNamespace(temperature=0.5, thinking_token_budget=None))
    assert allows_drafts(SimpleNamespace(temperature=0.5))  # an older vLLM
    assert not allows_drafts(SimpleNamespace(thinking_token_budget=0))


def test_logits_processors_that_are_named_or_installed_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_logits_processors(SimpleNamespace(logits_processors=None))
    with pytest.raises(ArgumentError, match=r"logits processors \(mine:Processor, int\) are applied one token"):
        check_logits_processors(SimpleNamespace(logits_processors=["mine:Processor", int]))
    package = tmp_path / "theirs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.logits_processors]\nrhymes = theirs:Rhymes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ArgumentError, match=r"\(rhymes of theirs\).* without packages that bring them"):
        check_logits_processors(SimpleNamespace())


@needs_vllm
@pytest.mark.slow
def test_what_is_refused_is_named_and_the_engine_goes_on() -> None:
    found = run_engine(["refusals", "plain_text"], two_tower(8), **ROOMY)
    fields = fields_of("vllm/sampling_params.py", "SamplingParams")
    assert found["refusals"].keys() == {"prompt_logprob_token_ids", "trace_decode_token_ids"} & set(fields)
    for name, message in found["refusals"].items():
        assert name in message, (name, message)
    assert found["plain_text"] == run_engine(["plain_text"], None, **ROOMY)["plain_text"]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "knobs"),
    [
        ("raw_logprobs", {"policy": "fixed", "block_size": 8}),
        ("raw_logprobs", {"policy": "off"}),
        ("processed_logits", {"policy": "fixed", "block_size": 8}),
    ],
)
def test_log_probabilities_of_named_tokens_are_those_without_speculation(mode: str, knobs: dict[str, Any]) -> None:
    name, engine = "logprobs_of_named_tokens", {**ROOMY, "max_logprobs": -1, "logprobs_mode": mode}
    expected = run_engine([name], None, **engine)[name]
    found = run_engine([name, "facts"], two_tower(8, **knobs), **engine)
    assert expected["alone"][0]["positions"][0].keys() >= {"5", "300"}
    assert same(found[name]["alone"], expected["alone"])
    # Without speculation vLLM gives a request its own most probable tokens only where nobody names any.
    assert same(found[name]["together"], found[name]["alone"])
    assert found["facts"]["sampler_fallbacks"] == 0


def same(found: Any, expected: Any) -> bool:
    """Whether two results agree; log-probabilities to 1e-4, as sums of another batch are taken in another order."""
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected or (isinstance(found, float) and abs(found - expected) < 1e-4))
