"""Traps in computation: an op is replaced by one that is wrong, where the towers find it, and the check sees it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diagnosis.planted import Tensors, findings, the, verdicts, with_weights
from tests.support.builders import tiny_config
from tests.support.cuda import emulated_devices
from tests.support.golden_files import checkpoint
from twotower_kernels.block_scan import op as scan
from twotower_kernels.experts import route
from twotower_spec import TwoTowerModel
from twotower_spec.diagnosis import computation, sample
from twotower_spec.state import ContextState
from twotower_spec.towers import backbone
from twotower_spec.towers.layers import moe


@pytest.mark.parametrize("name", ["trio", "T1", "T2"])
def test_a_healthy_drafter_computes_what_the_references_do(name: str) -> None:
    found = findings(computation.examine, None if name == "trio" else checkpoint(name))
    assert verdicts(found) == {"ok"}
    assert {one.looked_at for one in found} == {
        "scan of the context tower",
        "router of the context tower",
        "scan of the denoiser",
        "router of the denoiser",
        "order of modulation",
        "context tower",
    }


def test_the_layers_of_a_sample_are_computed_with_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SMALL", 0)
    assert verdicts(findings(computation.examine, checkpoint("T2"))) == {"ok"}


def test_a_scan_that_forgets_the_state_it_begins_from_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = scan.block_scan

    def forgetting(u: Tensor, delta: Tensor, conv: Tensor, ssm: Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock(u, delta, conv, torch.zeros_like(ssm), *args, **kwargs)

    monkeypatch.setattr(scan, "block_scan", forgetting)
    found = findings(computation.examine)
    for looked_at in ("scan of the context tower", "scan of the denoiser"):
        assert "the state carried" in the(found, looked_at, "fault").detail
    the(found, "order of modulation", "ok")


def test_rounding_that_sends_tokens_to_other_experts_is_no_fault(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 32, "num_experts_per_tok": 6, "moe_intermediate_size": 36}
    experts["moe_shared_expert_intermediate_size"] = 36
    config = tiny_config(hybrid_override_pattern="MEME*E" * 4, vocab_size=512, **experts)
    model = TwoTowerModel.from_config(config, dtype="bfloat16")
    with torch.inference_mode():
        assert computation._error_of_parts(model, *computation.PARTS) > 0.1  # with their experts
    model.save_pretrained(tmp_path)
    assert verdicts(findings(computation.examine, tmp_path)) == {"ok"}


@pytest.mark.parametrize("state", ["ssm", "conv", "keys"])
def test_a_context_that_loses_a_state_is_found(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = ContextState.extend

    def forgetting(context: ContextState, *args: Any) -> Any:
        held = context.kv_cache.keys if state == "keys" else getattr(context.mamba, state)
        held.zero_()
        return extend(context, *args)

    monkeypatch.setattr(ContextState, "extend", forgetting)
    the(findings(computation.examine), "context tower", "fault")


def test_numbers_that_are_none_are_the_weights_fault(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["context_tower.layers.0.mixer.A_log"].fill_(200.0)

    one = the(findings(computation.examine, with_weights(tmp_path / "huge", plant)), "context tower", "fault")
    assert "not finite" in one.detail and "weights" in one.remedy


def test_modulation_in_the_other_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "norm_then_modulate", backbone.modulate_then_norm)
    found = findings(computation.examine)
    assert "before experts" in the(found, "order of modulation", "fault").detail
    the(found, "router of the denoiser", "ok")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_that_is_not_in_float64_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(x: Tensor, router: Tensor, bias: Tensor, choice: Any) -> Any:
        scores = (x.to(dtype) @ router.to(dtype).T).sigmoid().float()
        return route(scores, bias.float(), choice)

    monkeypatch.setattr(moe, "route_tokens", narrow)
    found = findings(computation.examine)
    for looked_at in ("router of the context tower", "router of the denoiser"):
        assert "other experts than in float64" in the(found, looked_at, "fault").detail


def test_a_router_that_was_rounded_until_experts_score_the_same_is_found(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.startswith("denoiser_tower.") and ".gate." in name:
                step = 4 * tensor.abs().max().clamp(min=1e-3)
                tensor.div_(step).round_().mul_(step)

    found = findings(computation.examine, with_weights(tmp_path / "rounded", plant))
    assert "chance decides" in the(found, "router of the denoiser", "warning").detail
    the(found, "router of the context tower", "ok")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated device needs a compiler")
def test_kernels_on_a_gpu_compute_what_the_references_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(computation, "LONG_PARTS", (9, 40))
    TwoTowerModel.from_config(tiny_config(hybrid_override_pattern="M*E")).save_pretrained(tmp_path)
    with emulated_devices(2) as usage:
        on_gpus = {"verifier_device": "cuda:0", "denoiser_device": "cuda:1"}
        assert verdicts(findings(computation.examine, tmp_path, **on_gpus)) == {"ok"}
    assert usage.kernels
