"""Context towers of other geometries than the bundled one: vLLM's text is `generate_ar`'s, and with drafts the same."""

from __future__ import annotations

import json
import os
import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support.golden_files import checkpoint
from tests.support.nemotron_h import VOCABULARY
from tests.vllm_plugin.fork_server import results_of
from tests.vllm_plugin.hybrid import ENGINE, run_hybrid
from twotower_spec import TwoTowerConfig, TwoTowerModel

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
    pytest.mark.usefixtures("mamba_layers"),
]

NUM_TOKENS = 40
ITSELF = {"num_speculative_tokens": 7, "twotower": {"self": True, "policy": "fixed"}}
GIB = 1 << 30
PROMPT = [7, 100, 23, 9, 300]


def save_two_tower(folder: Path, like: str, **changes: Any) -> Path:
    """Random weights in the published layout, of the geometry of a golden checkpoint with changes, in small shards."""
    config = TwoTowerConfig.from_pretrained(checkpoint(like)).replace(vocab_size=VOCABULARY, **changes)
    TwoTowerModel.from_config(config, dtype="float32", seed=3).save_pretrained(folder, max_shard_bytes=1 << 20)
    return folder


def own_text(folder: Path, texts: list[list[int]]) -> list[list[int]]:
    """Texts with the same prompts by `generate_ar`."""
    model = TwoTowerModel.from_pretrained(folder, dtype=torch.float32)
    prompts = [text[:-NUM_TOKENS] for text in texts]
    found = model.generate_ar(prompts, max_new_tokens=NUM_TOKENS).token_ids
    return [prompt + row for prompt, row in zip(prompts, found, strict=True)]


@pytest.mark.parametrize(
    ("like", "changes", "settings"),
    [
        ("T1", {"head_dim": 32, "norm_eps": 1e-2}, None),
        ("T1", {"head_dim": 96, "hybrid_override_pattern": "-*M-*M", "num_hidden_layers": 6}, ITSELF),
        ("T2", {"head_dim": 64}, ITSELF),
        ("T2", {"head_dim": 80, "num_key_value_heads": 8}, None),
    ],
)
def test_text_is_the_context_towers(tmp_path: Path, like: str, changes: dict[str, Any], settings: Any) -> None:
    model = save_two_tower(tmp_path / "model", like, **changes)
    config = json.loads((model / "config.json").read_text())
    assert "auto_map" in config  # of files that are not there
    del config["layer_norm_epsilon"]
    (model / "config.json").write_text(json.dumps({**config, "n_shared_experts": 2}))
    found = run_hybrid(model, settings, max_tokens=NUM_TOKENS)
    assert found["texts"] == own_text(model, found["texts"])
    assert (found["drafted"] > 100) == (settings is not None)  # a random denoiser guesses none


def add_hole(file: Path, name: str, num_bytes: int) -> None:
    """Adds a tensor to a file, of zeros that take no space on the disk."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    size = len(content) - start
    entry = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [size, size + num_bytes]}
    header = json.dumps({**json.loads(content[8:start]), name: entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
    os.truncate(file, file.stat().st_size + num_bytes)


def write_growth(model: str, output: str) -> None:
    """Text of an engine, and the bytes by which this process has grown while it started."""
    from vllm import LLM, SamplingParams

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    llm = LLM(model=model, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **ENGINE)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    row = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0]
    Path(output).write_text(json.dumps({"text": list(row.outputs[0].token_ids), "growth": grown << 10}))
    core: Any = llm.llm_engine.engine_core
    core.shutdown()


def test_tensors_of_the_denoiser_are_not_read(tmp_path: Path) -> None:
    model = save_two_tower(tmp_path / "model", "T1", head_dim=32)
    expected = own_text(model, [[*PROMPT, *[0] * NUM_TOKENS]])
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            towers = {name.partition(".")[0] for name in opened.keys()}  # noqa: SIM118 (it is no dictionary)
        if "denoiser_tower" in towers:
            add_hole(file, "denoiser_tower.more", 2 * GIB)
    found, log = results_of(f"{__name__}:write_growth", str(model))
    assert [*PROMPT, *found["text"]] == expected[0]
    assert found["growth"] < GIB  # of 4 GiB, half of them in a file with tensors of the context tower
    assert "Skipped 1/3 safetensors shard(s)" in log
