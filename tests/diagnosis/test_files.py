"""Traps in files: each is planted into the bundled models and found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.diagnosis.planted import copy_of, findings, the, verdicts, with_config
from tests.support.golden_files import checkpoint
from twotower_spec.diagnosis import examination, examine, files


@pytest.fixture(autouse=True)
def _without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "entry_points", lambda group: [])


def test_the_bundled_models_can_be_read() -> None:
    found = [*findings(files.examine_drafter), *findings(files.examine_verifier)]
    assert verdicts(found) == {"ok"}
    assert "M*EM*E, 126 tensors" in the(found, "drafter", "ok").detail


@pytest.mark.parametrize(
    ("changes", "looked_at", "named"),
    [
        ({"conv_kernel": 3}, "drafter", "misshaped: context_tower.layers.0.mixer.conv1d.weight is [512, 1, 4]"),
        ({"conv_kernel": 0}, "drafter", "conv_kernel 0 is not allowed"),
        ({"mask_token_id": 2048}, "drafter", "mask_token_id 2048 is outside the vocabulary"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "drafter", "is not a TwoTower checkpoint"),
        ({"block_size": 0}, "block size", "block_size 0 is not allowed"),
        ({"block_size": "16"}, "block size", "block_size '16' is not allowed"),
    ],
)
def test_a_configuration_that_does_not_fit_is_found(
    changes: dict[str, Any], looked_at: str, named: str, tmp_path: Path
) -> None:
    drafter = with_config(tmp_path / "drafter", **changes)
    assert named in the(findings(files.examine_drafter, drafter), looked_at, "fault").detail


def test_a_file_that_was_cut_off_is_found(tmp_path: Path) -> None:
    drafter = copy_of("twotower", tmp_path / "cut")
    file = drafter / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "truncated or corrupt" in the(findings(files.examine_drafter, drafter), "drafter", "fault").detail


def test_a_shard_that_is_missing_is_found(tmp_path: Path) -> None:
    drafter = copy_of("twotower", tmp_path / "shards")
    for file in checkpoint("T2").iterdir():
        (drafter / file.name).write_bytes(file.read_bytes())
    (drafter / "model-00002-of-00003.safetensors").unlink()
    one = the(findings(files.examine_drafter, drafter), "drafter", "fault")
    assert "names shards that are not there: model-00002-of-00003.safetensors" in one.detail


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ChatGLMModel", "InternVLChatModel", "NemotronH_Nano_VL_V2"])
def test_whether_an_architecture_of_an_unusual_name_writes_text_is_left_to_vllm(name: str, tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "unusual", "verifier", architectures=[name])
    one = the(findings(files.examine_verifier, verifier=verifier), "verifier", "warning")
    assert f"{name}, an architecture of an unusual name" in one.detail and "vLLM says of it below" in one.remedy


def test_a_verifier_that_does_not_say_how_many_ids_it_has_is_found(tmp_path: Path) -> None:
    verifier = copy_of("verifier", tmp_path / "image")
    (verifier / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    assert "vocab_size" in the(findings(files.examine_verifier, verifier=verifier), "verifier", "fault").detail


@pytest.mark.parametrize("missing", ["drafter", "verifier"])
def test_a_folder_that_is_not_there_is_one_fault_and_the_rest_is_skipped(missing: str, tmp_path: Path) -> None:
    found = findings(examine, **{missing: tmp_path / "nowhere"})
    faults = [one for one in found if one.verdict == "fault"]
    assert len(faults) == 1 and "nowhere" in faults[0].detail and faults[0].remedy
    skipped = {one.area for one in found if one.verdict == "skipped"}
    assert {"vocabulary", "memory", "weights", "computation", "short run"} <= skipped
