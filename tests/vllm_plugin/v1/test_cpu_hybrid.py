"""Verifiers with Mamba-2 layers and experts on a CPU: texts are the model's, and with drafts the same."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.engine import two_tower
from tests.vllm_plugin.hybrid import LENGTHS, replaying, run_hybrid
from twotower_spec.config import TwoTowerConfig
from twotower_spec.demo.trio import trio_path
from twotower_spec.errors import ArgumentError

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

TRIO = str(trio_path("twotower"))
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory, mamba_layers: None) -> Path:
    return save_nemotron_h(tmp_path_factory.mktemp("verifier") / "model")


@pytest.fixture(scope="module")
def texts(verifier: Path) -> list[list[int]]:
    found: list[list[int]] = run_hybrid(verifier)["texts"]
    return found


@pytest.mark.slow
def test_text_without_drafts_is_that_of_transformers(verifier: Path, texts: list[list[int]]) -> None:
    from transformers import NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    for text, length in zip(texts[:3], LENGTHS, strict=False):
        logits = model(torch.tensor([text])).logits[0]
        assert logits[length - 1 : -1].argmax(-1).tolist() == text[length:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_drafts", "drafts", "engine"),
    [
        (1, "ragged", {}),
        (3, "partial", {"max_num_seqs": 3}),
        (7, "random", {"max_num_batched_tokens": 64}),
        (15, "perfect", {}),
        (7, "partial", {"enable_prefix_caching": True, "passes": 2}),
    ],
)
def test_text_with_drafts_is_the_same(
    verifier: Path, texts: list[list[int]], num_drafts: int, drafts: str, engine: dict[str, Any]
) -> None:
    found = run_hybrid(verifier, replaying(num_drafts), known=texts, drafts=drafts, **engine)
    assert found["texts"] == texts
    assert (found["accepted"] > 50) == (drafts != "random")
    assert (found["cached"] > 100) == ("passes" in engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, {"tensor_parallel_size": 2}])
def test_other_methods_are_repaired_too(verifier: Path, texts: list[list[int]], engine: dict[str, Any]) -> None:
    found = run_hybrid(verifier, NGRAM, **engine)
    assert found["texts"] == texts and found["drafted"] > 100


@pytest.mark.slow
def test_prefix_cache_without_drafts(verifier: Path) -> None:
    shared = run_hybrid(verifier, shared=96, max_tokens=32)["texts"]
    found = run_hybrid(verifier, shared=96, max_tokens=32, enable_prefix_caching=True, passes=2)
    assert found["cached"] > 8 * 90 and found["texts"] == shared


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_bfloat16_and_no_experts(tmp_path: Path) -> None:
    dense = save_nemotron_h(tmp_path / "dense", "MM*M-M", torch.bfloat16)
    expected = run_hybrid(dense, dtype="bfloat16")["texts"]
    found = run_hybrid(dense, replaying(7), known=expected, drafts="ragged", dtype="bfloat16")
    assert found["texts"] == expected and found["accepted"] > 100


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_two_tower_drafts_for_a_hybrid(tmp_path: Path) -> None:
    verifier = save_nemotron_h(tmp_path / "verifier", vocabulary=TwoTowerConfig.from_pretrained(TRIO).vocab_size)
    expected = run_hybrid(verifier)["texts"]
    found = run_hybrid(verifier, two_tower(7, policy="fixed"), enable_prefix_caching=True, passes=2)
    assert found["texts"] == expected and found["drafted"] > 1000


def test_other_recurrent_layers_are_refused_by_name() -> None:
    from vllm_twotower.requirements import check_hybrid

    jamba = SimpleNamespace(model="some/jamba", architecture="JambaForCausalLM")
    with pytest.raises(ArgumentError, match=r"^some/jamba is a JambaForCausalLM.*NemotronHForCausalLM.*, or a GPU$"):
        check_hybrid(jamba, on_cpu=True)


@pytest.mark.usefixtures("mamba_layers")
def test_mamba_2_layers_are_not_refused() -> None:
    from vllm_twotower.requirements import check_hybrid

    check_hybrid(SimpleNamespace(model="some/nano", architecture="NemotronHForCausalLM"), on_cpu=True)


def test_vllm_that_has_changed_refuses_a_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_twotower.requirements import check_hybrid

    monkeypatch.delattr(GPUModelRunner, "_may_reorder_batch")
    with pytest.raises(ArgumentError, match=r"GPUModelRunner\._may_reorder_batch, without which drafts would change"):
        check_hybrid(SimpleNamespace(model="some/nano", architecture="NemotronHForCausalLM"), on_cpu=False)
    # Model runner V2 needs no repair where vLLM has kernels for such layers.
    check_hybrid(SimpleNamespace(model="some/nano", architecture="NemotronHForCausalLM"), on_cpu=False, on_v2=True)
