"""Short runs of the bundled models, and of drafters that are as bad as they get."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.diagnosis.planted import (
    Tensors,
    copy_of,
    findings,
    random_denoiser,
    the,
    verdicts,
    with_config,
    with_rows,
    with_weights,
)
from tests.diagnosis.test_memory import hybrid
from twotower_spec.demo.trio import trio_path
from twotower_spec.diagnosis import Case, short_run

ON_CPU: dict[str, Any] = {"verifier_device": "cpu"}


def test_the_bundled_drafter_is_as_good_as_it_was_measured() -> None:
    found = findings(short_run.examine, **ON_CPU)
    assert verdicts(found) == {"ok"}
    names = {"first token", "acceptance by position", "tokens per round", "repetition", "tokens per pass"}
    assert {one.looked_at for one in found} == names
    assert "bundled trio 0.84 0.72" in the(found, "acceptance by position", "ok").detail


def test_a_denoiser_that_was_never_trained_is_found(tmp_path: Path) -> None:
    found = findings(short_run.examine, with_weights(tmp_path / "random", random_denoiser), **ON_CPU)
    the(found, "first token", "ok")
    assert "the model card" in the(found, "acceptance by position", "warning").remedy
    assert "stuck at 1" in the(found, "tokens per pass", "warning").remedy


def test_a_context_tower_of_another_model_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["context_lm_head.weight"] = tensors["context_lm_head.weight"].roll(1, dims=0)

    found = findings(short_run.examine, with_weights(tmp_path / "other", plant), **ON_CPU)
    assert "verifier's family" in the(found, "first token", "warning").remedy
    assert "stuck near 1" in the(found, "tokens per round", "warning").remedy


def test_a_denoiser_that_repeats_itself_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["denoiser_tower.norm_f.weight"].fill_(0)
        tensors["denoiser_tower.norm_f.weight"][0] = 1
        tensors["lm_head.weight"].zero_()
        tensors["lm_head.weight"][700, 0] = 9  # one token wherever the first channel is positive

    found = findings(short_run.examine, with_weights(tmp_path / "repeating", plant), **ON_CPU)
    assert "of the drafts repeat" in the(found, "repetition", "warning").detail


@pytest.mark.parametrize(("experts_dtype", "least"), [(None, 1.0), ("int8", 0.9)])
def test_a_checkpoint_that_drafts_for_itself_is_run_without_transformers(
    experts_dtype: str | None, least: float
) -> None:
    found = findings(short_run.examine, verifier=trio_path("twotower"), experts_dtype=experts_dtype, **ON_CPU)
    share = re.search(r"verifier's in (\d\.\d+)", the(found, "first token", "ok").detail)
    assert share is not None and float(share[1]) >= least


@pytest.mark.slow
def test_a_verifier_with_mamba_layers_is_run(tmp_path: Path) -> None:
    found = findings(short_run.examine, verifier=hybrid(tmp_path / "hybrid"), **ON_CPU)
    the(found, "first token", "warning")  # its weights are random


def test_prompts_of_tokens_that_the_drafter_does_not_have_are_left_out(tmp_path: Path) -> None:
    for rows, num_left in ((2000, range(1, 9)), (300, range(1))):
        drafter = with_rows(tmp_path / str(rows), rows)
        for file in trio_path("twotower").glob("tokenizer*"):
            shutil.copy(file, drafter)
        found = findings(short_run.examine, drafter, **ON_CPU)
        assert verdicts(found) <= ({"ok", "warning"} if num_left[-1] else {"skipped"})
        assert len(short_run._prompts(Case(str(drafter), str(trio_path("verifier")), **ON_CPU))) in num_left


def test_a_verifier_that_transformers_does_not_run_is_no_fault(tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "unknown", "verifier", model_type="unheard_of")
    (one,) = findings(short_run.examine, verifier=verifier, **ON_CPU)
    assert one.verdict == "skipped" and "ArgumentError" in one.detail and "bench acceptance" in one.remedy
    broken = copy_of("verifier", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    (one,) = findings(short_run.examine, verifier=broken, **ON_CPU)
    assert one.verdict == "skipped" and "does not run outside of vLLM" in one.detail


def test_models_that_are_not_small_are_run_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_run, "SMALL", 1 << 20)
    (one,) = findings(short_run.examine, **ON_CPU)
    assert one.verdict == "skipped" and "129.5 MiB" in one.detail and "--run" in one.remedy
    (shared,) = findings(short_run.examine, tensor_parallel_size=2, **ON_CPU)
    assert shared.detail == one.detail
    (one,) = findings(short_run.examine, run=False, **ON_CPU)
    assert one.verdict == "skipped"
    assert len(findings(short_run.examine, run=True, **ON_CPU)) == 5
