"""Memory in vLLM that `inspect T --verifier V` adds up from configurations, and numbers that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command
from tests.support.nemotron_h import save_nemotron_h
from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_spec import TwoTowerModel
from twotower_spec.config import TwoTowerConfig
from twotower_spec.demo.trio import trio_path
from twotower_spec.drafting import AsyncSession, DraftingSession, FixedPolicy
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE

GIB, MIB = 2**30, 2**20
TWO_TOWER, VERIFIER = trio_path("twotower"), trio_path("verifier")


def with_tokenizer(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TWO_TOWER / name, folder)
    return folder


def save_config(folder: Path, content: TwoTowerConfig | dict[str, Any]) -> Path:
    text = content.to_json() if isinstance(content, TwoTowerConfig) else json.dumps(content)
    (with_tokenizer(folder) / "config.json").write_text(text)
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The published model's config.json, and another tokenizer."""
    return save_config(tmp_path / "published", PUBLISHED_SIZE)


def memory_of(command: Command, drafter: Path, verifier: Path, *options: object) -> dict[str, Any]:
    code, out, err = command("inspect", drafter, "--verifier", verifier, "--json", *options)
    assert (code, err) == (0, "")
    memory: dict[str, Any] = json.loads(out)["memory"]
    return memory


def lines_of(memory: dict[str, Any], holder: str) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in memory["lines"] if line["holder"] == holder}


def test_the_published_model_takes_59_gib_a_tower_and_47_mib_a_state(
    command: Command, published: Path, tmp_path: Path
) -> None:
    another = save_config(tmp_path / "another", PUBLISHED_SIZE)
    memory = memory_of(command, published, another, "--num-speculative-tokens", 7, "--max-num-seqs", 16)
    drafter, verifier = lines_of(memory, "drafter"), lines_of(memory, "verifier")
    assert [round(drafter[f"{tower} tower"]["total"] / GIB) for tower in ("context", "denoiser")] == [59, 59]
    assert round(verifier["weights"]["total"] / GIB) == 59
    ssm, history = 23 * 64 * 64 * 128 * 4, 23 * 6144 * 2
    assert drafter["Mamba states"]["num_bytes"] == ssm + 3 * history
    assert round(drafter["Mamba states"]["num_bytes"] / MIB) == 47
    assert drafter["keys and values"]["num_bytes"] == verifier["keys and values"]["num_bytes"] == 6144
    assert memory["state_bytes"] == ssm + 10 * history
    assert verifier["Mamba states, none"]["total"] == 16 * 8 * memory["state_bytes"]
    assert verifier["Mamba states, align"]["total"] == 16 * 10 * memory["state_bytes"]
    assert (memory["num_drafts"], memory["max_num_batched_tokens"]) == ([3, 7], 128)


def test_quantised_experts_are_counted_as_they_are_held(command: Command, published: Path, tmp_path: Path) -> None:
    another = save_config(tmp_path / "another", PUBLISHED_SIZE)
    memory = memory_of(command, published, another, "--max-num-seqs", 8, "--experts-dtype", "int8")
    drafter, verifier = lines_of(memory, "drafter"), lines_of(memory, "verifier")
    assert [round(drafter[f"{tower} tower"]["total"] / GIB, 1) for tower in ("context", "denoiser")] == [31.5, 31.6]
    assert sum(line["total"] for name, line in drafter.items() if name != "copied keys") < 80e9
    assert round(verifier["weights"]["total"] / GIB) == 59  # of the drafter alone


def test_a_model_that_drafts_for_itself_has_one_context_tower(
    command: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(published)
    memory = memory_of(command, published, tmp_path / "link", "--num-speculative-tokens", 7, "--max-num-seqs", 16)
    drafter, verifier = lines_of(memory, "drafter"), lines_of(memory, "verifier")
    assert memory["has_one_context_tower"] is True and set(drafter) == {"denoiser tower"}
    assert round(drafter["denoiser tower"]["total"] / GIB) == round(verifier["weights"]["total"] / GIB) == 59
    monkeypatch.setenv("COLUMNS", "160")
    assert (
        "there is one context tower" in command("inspect", published, "--verifier", published, "--max-num-seqs", 1)[1]
    )
    two = memory_of(command, published, published, "--tensor-parallel-size", 2)
    assert two["has_one_context_tower"] is False and "context tower" in lines_of(two, "drafter")


def test_the_table_has_the_formulas_and_what_to_set(
    command: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    another = save_config(tmp_path / "another", PUBLISHED_SIZE)
    options = ("--num-speculative-tokens", 3, "--max-num-seqs", 4)
    code, out, err = command("inspect", published, "--verifier", another, *options)
    assert (code, err) == (0, "")
    for text in (
        "23 M x (6144 x 3 x 2 B + 64 x 64 x 128 x 4 B)",
        "(1 + 3) x 23 M x (6144 x (3 + 3) x 2 B + 64 x 64 x 128 x 4 B)",
        "6 * x 2 x 2 x 128 x 2 B",
        "58.83 GiB",
        "4 requests x 46.8 MiB",
        "--spec-tokens 3 to 7; every draft costs a request 47.6 MiB more",
        "--max-num-batched-tokens 16 or more",
    ):
        assert text in out


def test_the_drafter_takes_what_it_says_it_holds(command: Command) -> None:
    memory = memory_of(command, TWO_TOWER, VERIFIER, "--max-num-seqs", 3, "--context-length", 100, "--dtype", "float32")
    found = lines_of(memory, "drafter")
    model = TwoTowerModel.from_pretrained(TWO_TOWER, dtype="float32")
    session = DraftingSession(model, FixedPolicy(block_size=16, num_steps=1), num_slots=3, num_tokens=300)
    session.warm_up()
    held = session.memory()
    assert found["context tower"]["total"] == held.context_tower_bytes
    assert found["denoiser tower"]["total"] == held.denoiser_tower_bytes
    page = DEFAULT_PAGE_SIZE * found["keys and values"]["num_bytes"]
    assert found["mirror"]["total"] == found["Mamba states"]["total"] + found["keys and values"]["total"] + page
    pool = sum(found[name]["total"] for name in ("Mamba states", "keys and values", "last logits"))
    assert pool == held.state_bytes
    assert found["copied keys"]["total"] == session.state.workspace_nbytes > 0
    with_scratch = AsyncSession(
        model, FixedPolicy(block_size=16, num_steps=1), num_slots=3, num_tokens=300, most_per_step=8
    )
    assert pool + found["scratch"]["total"] == with_scratch.memory().state_bytes


def test_the_pool_is_that_of_the_knobs_defaults(command: Command) -> None:
    found = lines_of(memory_of(command, TWO_TOWER, VERIFIER, "--max-num-seqs", 500), "drafter")
    assert found["Mamba states"]["count"] == 64
    assert found["keys and values"]["count"] == 64 * 2048


def test_a_verifier_of_attention_alone_has_keys_and_values(command: Command) -> None:
    memory = memory_of(command, TWO_TOWER, VERIFIER, "--max-num-seqs", 2, "--context-length", 100)
    found = lines_of(memory, "verifier")
    assert set(found) == {"weights", "keys and values"}
    assert found["weights"]["total"] == (VERIFIER / "model.safetensors").stat().st_size
    assert found["keys and values"]["total"] == 8 * 2 * 4 * 64 * 2 * 100 * 2
    assert (memory["num_drafts"], memory["state_bytes"]) == ([7, 15], 0)


def test_ranks_share_the_verifier_and_not_the_drafter(command: Command, published: Path, tmp_path: Path) -> None:
    another = save_config(tmp_path / "another", PUBLISHED_SIZE)
    one, four = (memory_of(command, published, another, "--tensor-parallel-size", size) for size in (1, 4))
    assert lines_of(one, "drafter") == lines_of(four, "drafter")
    assert four["state_bytes"] == one["state_bytes"] // 4
    weights = [lines_of(memory, "verifier")["weights"]["total"] for memory in (one, four)]
    assert weights[1] == weights[0] // 4
    per_token = [lines_of(memory, "verifier")["keys and values"]["num_bytes"] for memory in (one, four)]
    assert per_token == [6144, 3072]  # of two heads each rank has one


def test_layers_are_read_from_their_names_as_well_and_weights_from_the_index(command: Command, tmp_path: Path) -> None:
    pattern = with_tokenizer(save_nemotron_h(tmp_path / "pattern", vocabulary=2048))
    content = json.loads((pattern / "config.json").read_text())
    letters = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    content["layers_block_type"] = [letters[letter] for letter in content.pop("hybrid_override_pattern")]
    named = save_config(tmp_path / "named", {"text_config": content, "vocab_size": 2048})
    (named / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 7 * GIB}}))
    of_pattern, of_names = (memory_of(command, TWO_TOWER, model, "--max-num-seqs", 3) for model in (pattern, named))
    assert of_pattern["state_bytes"] == of_names["state_bytes"] > 0
    assert lines_of(of_names, "verifier")["weights"]["total"] == 7 * GIB


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "the kind linear_attention"),
        ({"layer_types": ["full_attention", "novel"]}, "the kind novel"),
        ({"hybrid_override_pattern": "MX"}, "layers 'X'"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_a_cache_that_is_not_known_is_said_to_be_so(
    fields: dict[str, Any], named: str, command: Command, tmp_path: Path
) -> None:
    content = json.loads((VERIFIER / "config.json").read_text())
    verifier = save_config(tmp_path / "verifier", {**content, "layer_types": None, **fields})
    memory = memory_of(command, TWO_TOWER, verifier, "--max-num-seqs", 3)
    assert named in memory["unknown"]
    assert lines_of(memory, "verifier")["weights"]["total"] is None
    code, out, _ = command("inspect", TWO_TOWER, "--verifier", verifier, "--max-num-seqs", 3)
    assert code == 0 and "not all is known" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num-speculative-tokens", 0], "--num-speculative-tokens 0 is not allowed; give an integer from 1 to 128"),
        (["--num-speculative-tokens", 129], "--num-speculative-tokens 129"),
        (["--max-num-seqs", 0], "--max-num-seqs 0"),
        (["--tensor-parallel-size", 0], "--tensor-parallel-size 0"),
        (["--tensor-parallel-size", 3], "does not divide the verifier's 64 Mamba heads"),
        (["--max-num-seqs", 1, "--context-length", -1], "--context-length -1"),
        (["--max-num-seqs", 1, "--dtype", "int4"], "dtype 'int4'"),
    ],
)
def test_a_number_out_of_range_is_one_sentence(
    options: list[object], named: str, command: Command, published: Path
) -> None:
    code, out, err = command("inspect", published, "--verifier", published, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and named in err and err.count("\n") == 1


@pytest.mark.parametrize("option", ["--num-speculative-tokens", "--max-num-seqs", "--tensor-parallel-size"])
def test_an_option_about_a_verifier_needs_one(option: str, command: Command) -> None:
    code, out, err = command("inspect", TWO_TOWER, option, 2)
    assert (code, out) == (2, "")
    assert f"{option} is about a verifier" in err and err.count("\n") == 1
