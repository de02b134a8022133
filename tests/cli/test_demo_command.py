"""`twotower-spec demo` without vLLM, and the bundled checkpoint as the default of `generate`."""

import json
import sys

import pytest

from tests.support.command_line import Command
from twotower_spec.demo import held_out_prompts


def test_the_standalone_demo_generates_held_out_prompts_in_all_modes_and_compares_them(command: Command) -> None:
    code, out, _ = command("demo", "--standalone", "--prompts", 1, "--max-new-tokens", 24)
    assert code == 0
    assert "vLLM is not installed" not in out
    assert "maths, held out by template: " + held_out_prompts("maths")[0].source in out
    table = {line.split("│")[1].strip(): line.split("│")[2:6] for line in out.splitlines() if line.startswith("│")}
    assert list(table) == ["ar", "mock-ar", "mask-diffusion", "self-speculative"]
    tokens, per_nfe, per_context_pass, speed = (float(cell) for cell in table["self-speculative"])
    assert tokens == float(table["ar"][0]) and per_nfe > 1.0 and per_context_pass > 1.0 and speed > 0
    assert table["ar"][1].strip() == "-" and float(table["ar"][2]) == float(table["mock-ar"][1]) == 1.0


def test_where_vllm_is_not_installed_the_demo_says_so_and_runs_standalone(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # Python then treats the package as not installed
    code, out, _ = command("demo", "--prompts", 1, "--max-new-tokens", 8)
    assert code == 0
    assert out.startswith("vLLM is not installed") and out.count("vLLM") == 1
    assert "self-speculative" in out


def test_generate_takes_the_bundled_checkpoint_by_default(command: Command) -> None:
    prompt = held_out_prompts("maths")[0].prompt
    code, out, _ = command("generate", prompt, "--json", "--dtype", "float32", "--mode", "ar")
    assert code == 0
    record = json.loads(out)
    assert record["prompt"] == prompt and "The answer is" in record["text"]
