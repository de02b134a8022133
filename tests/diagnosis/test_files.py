"""Traps in files: each is planted into the bundled models and found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.diagnosis.planted import (
    Tensors,
    copy_of,
    findings,
    the,
    verdicts,
    with_config,
    with_shards,
    with_weights,
)
from tests.support.golden_files import checkpoint
from twotower_spec.demo.trio import trio_path
from twotower_spec.diagnosis import examination, examine, files

WEIGHTS, TABLE = "verifier's weights", "model.embed_tokens.weight"


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
    one = the(findings(files.examine_drafter, drafter), "drafter", "fault")
    assert "truncated or corrupt" in one.detail and one.remedy == "download it again"


def test_a_shard_that_is_missing_is_found(tmp_path: Path) -> None:
    drafter = copy_of("twotower", tmp_path / "shards")
    for file in checkpoint("T2").iterdir():
        (drafter / file.name).write_bytes(file.read_bytes())
    (drafter / "model-00002-of-00003.safetensors").unlink()
    one = the(findings(files.examine_drafter, drafter), "drafter", "fault")
    assert one.detail.endswith("names shards that are not there: model-00002-of-00003.safetensors")
    assert one.remedy == "download them again"


def test_an_index_of_the_drafter_that_is_no_json_has_one_remedy(tmp_path: Path) -> None:
    drafter = copy_of("twotower", tmp_path / "index")
    (drafter / "model.safetensors.index.json").write_text("{")
    one = the(findings(files.examine_drafter, drafter), "drafter", "fault")
    assert "is not JSON" in one.detail and ";" not in one.detail and one.remedy == "download it again"


def test_tensors_that_do_not_fit_the_configuration_have_one_remedy(tmp_path: Path) -> None:
    drafter = with_config(tmp_path / "misshaped", conv_kernel=3)
    remedy = the(findings(files.examine_drafter, drafter), "drafter", "fault").remedy
    assert remedy.startswith("use the config.json") and "inspect" in remedy


def _without(verifier: Path) -> None:
    (verifier / "model.safetensors").unlink()
    (verifier / "training_args.bin").write_bytes(b"left by a training")


def _cut(verifier: Path) -> None:
    file = verifier / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _pointer(verifier: Path) -> None:
    (verifier / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 1\n")


def _index_alone(verifier: Path) -> None:
    listed = {"metadata": {}, "weight_map": {TABLE: "elsewhere.safetensors"}}
    (verifier / "model.safetensors.index.json").write_text(json.dumps(listed))


def _index_of_nothing(verifier: Path) -> None:
    (verifier / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))


@pytest.mark.parametrize(
    ("plant", "named", "remedy"),
    [
        (_without, "holds no weights", "put the safetensors files"),
        (_cut, "truncated or corrupt", "download it again"),
        (_pointer, "a git-lfs pointer", "git lfs pull"),
        (_index_alone, "shards that are not there: elsewhere.safetensors", "download them again"),
        (_index_of_nothing, "weight_map is empty", "download it again"),
    ],
)
def test_weights_of_the_verifier_with_which_no_server_starts_are_found(
    plant: Callable[[Path], None], named: str, remedy: str, tmp_path: Path
) -> None:
    verifier = copy_of("verifier", tmp_path / "verifier")
    plant(verifier)
    one = the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "fault")
    assert named in one.detail and remedy in one.remedy


def test_every_shard_of_the_verifier_must_be_there_and_whole(tmp_path: Path) -> None:
    verifier = with_shards(tmp_path / "shards")
    the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "ok")
    last = verifier / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    one = the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "fault")
    assert last.name in one.detail and "truncated or corrupt" in one.detail
    last.unlink()
    one = the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "fault")
    assert one.detail.endswith(f"not there: {last.name}")


def test_weights_of_another_form_are_not_looked_into(tmp_path: Path) -> None:
    verifier = copy_of("verifier", tmp_path / "pickled")
    (verifier / "model.safetensors").rename(verifier / "pytorch_model.bin")
    one = the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "skipped")
    assert "not looked into" in one.detail
    _pointer(verifier)
    (verifier / "model.safetensors").replace(verifier / "pytorch_model.bin")
    assert "git-lfs" in the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "fault").detail


def test_a_two_tower_verifier_has_weights_as_others_do() -> None:
    the(findings(files.examine_verifier, verifier=trio_path("twotower")), WEIGHTS, "ok")


def test_of_a_hub_id_nothing_is_said_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "is_directory", lambda path: False)
    assert {one.looked_at for one in findings(files.examine_verifier)} == {"verifier"}


def test_more_token_ids_than_rows_are_found(tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "rows", "verifier", vocab_size=2049)
    one = the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "fault")
    assert "2048 rows, and config.json says 2049" in one.detail and "config.json" in one.remedy


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({TABLE: tensors[TABLE].to(torch.float8_e4m3fn)[:9]}),
        lambda tensors: tensors.update({TABLE: tensors[TABLE].flatten()}),
        lambda tensors: tensors.update({"transformer.wte.weight": tensors.pop(TABLE)[:9]}),
        lambda tensors: tensors.update({"model.position_embeddings.weight": tensors.pop(TABLE)[:9]}),
        lambda tensors: tensors.update({"audio.embed_tokens.weight": tensors[TABLE][:9].clone()}),
    ],
    ids=["quantised", "flat", "of another name", "of positions", "of another part"],
)
def test_tables_of_layouts_that_are_not_known_are_no_fault(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    verifier = with_weights(tmp_path / "unknown", change, "verifier")
    the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "ok")


def test_rows_that_ranks_share_are_counted_together(tmp_path: Path) -> None:
    verifier = copy_of("verifier", tmp_path / "ranks")
    (verifier / "model.safetensors").unlink()
    for rank in range(2):
        save_file({TABLE: torch.zeros(1024, 512)}, verifier / f"model-rank-{rank}-part-0.safetensors")
    the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "ok")


def test_a_verifier_of_several_parts_may_have_tables_of_any_size(tmp_path: Path) -> None:
    verifier = copy_of("verifier", tmp_path / "parts")
    config = json.loads((verifier / "config.json").read_text())
    parts = {"architectures": config["architectures"], "text_config": config | {"vocab_size": 4096}}
    (verifier / "config.json").write_text(json.dumps(parts))
    the(findings(files.examine_verifier, verifier=verifier), WEIGHTS, "ok")


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
