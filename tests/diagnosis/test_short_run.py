"""Short runs of the bundled models, and of drafters that are as bad as they get."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diagnosis.planted import (
    Tensors,
    copy_of,
    findings,
    random_denoiser,
    the,
    verdicts,
    with_config,
    with_permuted_tokens,
    with_rows,
    with_shards,
    with_weights,
)
from tests.diagnosis.test_memory import hybrid
from twotower_spec.demo.trio import Model, trio_path
from twotower_spec.diagnosis import Case, Verdict, short_run
from twotower_spec.training import quality, stages

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


def test_drafts_worth_nothing_are_a_fault(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        for name in ("context_lm_head.weight", "lm_head.weight"):
            tensors[name] = tensors[name].roll(1, dims=0)

    found = findings(short_run.examine, with_weights(tmp_path / "worthless", plant), **ON_CPU)
    one = the(found, "tokens per round", "fault")
    assert "worth nothing: 1.0" in one.detail and "train all" in one.remedy


@pytest.mark.parametrize(("length", "verdict"), [(1.04, "fault"), (1.05, "warning"), (1.49, "warning"), (1.5, "ok")])
def test_drafts_that_are_bad_are_no_fault_while_they_are_worth_something(
    length: float, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_run, "NEW_TOKENS", 4)
    monkeypatch.setattr(quality.Acceptance, "length", length)
    the(findings(short_run.examine, **ON_CPU), "tokens per round", verdict)


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
        case = Case(str(drafter), str(trio_path("verifier")), **ON_CPU)
        assert case.tokenizer is not None
        assert len(short_run._prompts(case, case.tokenizer)) in num_left


@pytest.mark.parametrize("without", ["drafter", "verifier"])
def test_prompts_are_read_with_the_tokenizer_that_there_is(without: str, tmp_path: Path) -> None:
    models = {"drafter": trio_path("twotower"), "verifier": trio_path("verifier")}
    models[without] = copy_of("twotower" if without == "drafter" else "verifier", tmp_path / without)
    for file in models[without].glob("tokenizer*"):
        file.unlink()
    assert verdicts(findings(short_run.examine, **models, **ON_CPU)) == {"ok"}


def test_prompts_are_read_with_the_tokenizer_of_the_verifier(tmp_path: Path) -> None:
    drafter = with_permuted_tokens(tmp_path / "permuted", "twotower")
    assert verdicts(findings(short_run.examine, drafter, **ON_CPU)) == {"ok"}


def test_without_any_tokenizer_nothing_is_run(tmp_path: Path) -> None:
    models = {"drafter": copy_of("twotower", tmp_path / "d"), "verifier": copy_of("verifier", tmp_path / "v")}
    for file in list(tmp_path.glob("?/tokenizer*")):
        file.unlink()
    (one,) = findings(short_run.examine, **models, **ON_CPU)
    assert one.verdict == "skipped" and "has no tokenizer" in one.detail


def test_a_verifier_that_transformers_does_not_run_is_no_fault(tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "unknown", "verifier", model_type="unheard_of")
    (one,) = findings(short_run.examine, verifier=verifier, **ON_CPU)
    assert one.verdict == "skipped" and "ArgumentError" in one.detail and "bench acceptance" in one.remedy
    assert "does not run outside of vLLM" in one.detail


def test_pickled_weights_and_lack_of_memory_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = copy_of("verifier", tmp_path / "pickled")
    (verifier / "model.safetensors").rename(verifier / "pytorch_model.bin")
    (one,) = findings(short_run.examine, verifier=verifier, run=True, **ON_CPU)
    assert one.verdict == "skipped" and "does not run outside of vLLM" in one.detail

    def load(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(stages, "load_verifier", load)
    (one,) = findings(short_run.examine, **ON_CPU)
    assert one.verdict == "skipped" and "OutOfMemoryError" in one.detail


def test_weights_of_the_verifier_that_cannot_be_loaded_are_a_fault(tmp_path: Path) -> None:
    cut, none = copy_of("verifier", tmp_path / "cut"), copy_of("verifier", tmp_path / "none")
    (cut / "model.safetensors").write_bytes(b"no tensors")
    (none / "model.safetensors").unlink()
    shards = with_shards(tmp_path / "shards")
    (shards / "model-00001-of-00002.safetensors").unlink()
    wide = with_config(tmp_path / "wide", "verifier", intermediate_size=1024)
    towers = with_config(tmp_path / "towers", conv_kernel=3)
    for verifier, reason in (
        (cut, "header"),
        (none, "holds no weights"),
        (shards, "not there: model-00001-of-00002.safetensors"),
        (wide, "other shapes than config.json"),
        (towers, "does not fit its config.json"),
    ):
        one = the(findings(short_run.examine, verifier=verifier, run=True, **ON_CPU), "verifier", "fault")
        assert "weights cannot be loaded" in one.detail and reason in one.detail and "download it" in one.remedy


def test_quantised_weights_may_have_other_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise RuntimeError("size mismatch for model.layers.0.mlp.up_proj.weight")

    monkeypatch.setattr(stages, "load_verifier", load)
    verifier = with_config(tmp_path / "quantised", "verifier", quantization_config={"quant_method": "awq"})
    (one,) = findings(short_run.examine, verifier=verifier, **ON_CPU)
    assert one.verdict == "skipped"


@pytest.mark.parametrize(("model", "norm"), [("verifier", "model.norm.weight"), ("twotower", "context_tower.norm_f")])
def test_logits_that_are_not_finite_are_a_fault_of_the_verifier(model: Model, norm: str, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        next(tensor for name, tensor in tensors.items() if name.startswith(norm)).fill_(float("nan"))

    verifier = with_weights(tmp_path / "nan", plant, model)
    (one,) = findings(short_run.examine, verifier=verifier, **ON_CPU)
    assert one == the([one], "verifier", "fault")
    assert "logits are not finite" in one.detail and "download it again" in one.remedy


def test_a_size_that_is_not_known_is_said_to_be_so(tmp_path: Path) -> None:
    verifier = copy_of("verifier", tmp_path / "unknown")
    (verifier / "model.safetensors").rename(verifier / "pytorch_model.bin")
    (one,) = findings(short_run.examine, verifier=verifier, **ON_CPU)
    assert one.verdict == "skipped" and one.detail == "the verifier's size is not known" and "--run" in one.remedy


def test_models_that_are_not_small_are_run_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_run, "SMALL", 1 << 20)
    (one,) = findings(short_run.examine, **ON_CPU)
    assert one.verdict == "skipped" and "129.5 MiB" in one.detail and "--run" in one.remedy
    (shared,) = findings(short_run.examine, tensor_parallel_size=2, **ON_CPU)
    assert shared.detail == one.detail
    (one,) = findings(short_run.examine, run=False, **ON_CPU)
    assert one.verdict == "skipped"
    assert len(findings(short_run.examine, run=True, **ON_CPU)) == 5
