"""Traps in weights: each is planted into the bundled drafter and found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.diagnosis.planted import Tensors, findings, the, verdicts, with_weights
from tests.support.golden_files import checkpoint
from twotower_spec.diagnosis import sample, weights


def test_the_bundled_drafter_is_healthy() -> None:
    found = findings(weights.examine)
    assert verdicts(found) == {"ok"}
    assert {one.looked_at for one in found} == {"numbers", "towers", "heads", "time conditioning"}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_single_number_that_is_none_is_found(value: float, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["denoiser_tower.layers.2.mixer.experts.1.up_proj.weight"][3, 5] = value

    one = the(findings(weights.examine, with_weights(tmp_path / "nan", plant)), "numbers", "fault")
    assert "denoiser_tower.layers.2.mixer.experts.1.up_proj.weight" in one.detail


def test_zeros_that_a_broken_download_leaves_are_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["context_tower.layers.1.mixer.o_proj.weight"].zero_()

    one = the(findings(weights.examine, with_weights(tmp_path / "zeros", plant)), "numbers", "warning")
    assert "context_tower.layers.1.mixer.o_proj.weight" in one.detail and "download" in one.remedy


def test_rows_of_zeros_are_found_and_those_of_reserved_tokens_are_no_harm(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["lm_head.weight"][1024:] = 0
        tensors["context_lm_head.weight"][1900:] = 0

    one = the(findings(weights.examine, with_weights(tmp_path / "part", plant)), "numbers", "warning")
    assert "rows of lm_head.weight are zeros" in one.detail


def test_first_layers_that_were_not_trained_are_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith(("denoiser_tower.layers.0.", "denoiser_tower.layers.1.", "denoiser_tower.layers.2.")):
                tensors[name] = tensors[name.replace("denoiser", "context")].clone()

    drafter = with_weights(tmp_path / "frozen", plant)
    monkeypatch.setattr(sample, "SMALL", 0)
    assert "layers 0, 1, 2 are the same in both" in the(findings(weights.examine, drafter), "towers", "ok").detail


def test_a_head_that_overwrote_the_other_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["context_lm_head.weight"].clone()

    one = the(findings(weights.examine, with_weights(tmp_path / "heads", plant)), "heads", "warning")
    assert "lm_head is the context tower's context_lm_head" in one.detail


def test_a_head_that_is_the_embedding_table_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["denoiser_tower.embeddings.weight"].clone()

    one = the(findings(weights.examine, with_weights(tmp_path / "tied", plant)), "heads", "warning")
    assert "the denoiser's head is its embedding table" in one.detail


def test_a_denoiser_that_is_a_copy_of_the_context_tower_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith("denoiser_tower."):
                tensors[name] = tensors[name.replace("denoiser", "context")].clone()

    one = the(findings(weights.examine, with_weights(tmp_path / "copy", plant)), "towers", "fault")
    assert "never trained" in one.detail


def test_gates_that_are_zero_are_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.startswith(("t_block.", "scale_shift_tables.")):
                tensor.zero_()

    one = the(findings(weights.examine, with_weights(tmp_path / "gates", plant)), "time conditioning", "fault")
    assert "gates are 0" in one.detail


def test_modulation_that_does_not_know_the_time_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["t_block.1.weight"].zero_()

    one = the(findings(weights.examine, with_weights(tmp_path / "time", plant)), "time conditioning", "warning")
    assert "the same whatever number" in one.detail


def test_of_a_large_checkpoint_a_layer_of_each_kind_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SMALL", 0)
    found = findings(weights.examine, checkpoint("T1"))  # MEM*EMEM*E
    assert "layers 0, 1, 3" in the(found, "numbers", "ok").detail
    assert torch.is_inference_mode_enabled() is False
