"""`twotower-spec inspect`: numbers that follow from the configuration, and every problem by name."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden_files import NAMES, checkpoint, golden_model
from twotower_spec.cli import main


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["twotower-spec", "inspect", *map(str, args)])
        code: Any = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.mark.parametrize("name", NAMES)
def test_healthy_checkpoint_shows_its_tensors_and_memory(inspect: Any, name: str) -> None:
    code, out = inspect(checkpoint(name), "--json", "--num-requests", 3, "--context-length", 100)
    found, model = json.loads(out), golden_model(name, "bfloat16" if name == "T2" else "float32")
    assert code == 0 and found["problems"] == []
    names = [n for n, _ in model.checkpoint_tensors()]
    assert found["parts"]["context"]["num_tensors"] + found["parts"]["denoiser"]["num_tensors"] == len(names)
    config, memory = model.config, found["memory"]
    per_request = config.mamba_bytes_per_request(model.dtype) + 100 * config.kv_bytes_per_token(model.dtype)
    assert memory["state_per_request"] == per_request
    weights = sum(p.numel() * p.element_size() for p in model.context.parameters())
    assert memory["context_weights"] == weights
    assert memory["context_device"] == weights + 3 * per_request


def test_table_says_that_nothing_is_wrong(inspect: Any) -> None:
    code, out = inspect(checkpoint("T1"))
    assert code == 0
    for text in ("MEM*EMEM*E", "context tower", "denoiser tower", "nothing wrong"):
        assert text in out


def test_every_problem_is_named_at_once(inspect: Any, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint("T2"), tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    code, out = inspect(broken)
    assert code == 2 and "misshaped: context_tower.layers.3.mixer.q_proj.weight" in out
    (broken / "config.json").write_text(json.dumps({**config, "n_groups": 4}))
    (broken / "model-00001-of-00003.safetensors").write_bytes(b"")
    code, out = inspect(broken)
    assert code == 2 and "n_groups 4 does not divide" in out and "truncated or corrupt" in out


def test_missing_checkpoint_is_one_sentence(inspect: Any, tmp_path: Path) -> None:
    code, out = inspect(tmp_path / "nowhere")
    assert code == 2 and out.startswith("error: ") and out.count("\n") == 1
