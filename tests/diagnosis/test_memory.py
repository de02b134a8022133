"""Memory beside what devices have, and the states that drafts hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.diagnosis.planted import copy_of, findings, the, with_config
from tests.support.cuda import emulated_devices
from tests.support.nemotron_h import save_nemotron_h
from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_spec.demo.trio import trio_path
from twotower_spec.diagnosis import Case, examination, examine, links, memory

STATES = "Mamba states per draft"


def hybrid(folder: Path) -> Path:
    """A verifier with Mamba layers that shares the bundled models' tokenizer."""
    save_nemotron_h(folder, vocabulary=2048)
    for file in copy_of("verifier", folder.parent / "bundled").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_the_bundled_models_fit() -> None:
    found = findings(memory.examine, verifier_device="cpu")
    assert "verifier's weights 47.0 MiB" in the(found, "cpu", "ok").detail
    assert "keeps none" in the(found, STATES, "ok").detail


def test_more_requests_than_fit_at_once_are_found() -> None:
    one = the(findings(memory.examine, verifier_device="cpu", max_num_seqs=10**6), "cpu", "warning")
    fitting = int(one.remedy.split()[1].rstrip(","))
    assert "not all requests fit" in one.detail and 64 < fitting < 10**6
    the(findings(memory.examine, verifier_device="cpu", max_num_seqs=fitting), "cpu", "ok")


def test_what_a_gpu_has_free_bounds_what_vllm_is_told_to_take_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"verifier_device": "cuda:0", "max_num_seqs": 64, "memory_gib": None}
    with emulated_devices(1):
        needed = memory_needed(the(findings(memory.examine, **case), "cuda:0", "ok").detail)
        shares = []
        for free, total in ((0.99, 1.03), (1.0, 1.05), (1.01, 1.02)):
            here = memory.DeviceMemory(int(free * 1.02 * needed), int(total * needed))
            monkeypatch.setattr(memory, "_memory_of", lambda device, here=here: here)
            one = the(findings(memory.examine, **case), "cuda:0", "warning")
            shares.append(float(one.remedy.removeprefix("--gpu-memory-utilization ")))
            assert needed / here.total - 0.01 <= shares[-1] <= here.free / here.total
    assert len(set(shares)) > 1


def memory_needed(detail: str) -> float:
    """Bytes that all requests take, in the words of a finding."""
    number, unit = detail.partition(" tokens take ")[2].split()[:2]
    return float(number) * 2 ** {"MiB": 20, "GiB": 30}[unit]


def test_models_that_do_not_fit_are_found_and_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "entry_points", lambda group: [])
    found = findings(examine, verifier_device="cpu", memory_gib=0.06)
    assert "a single request does not fit" in the(found, "cpu", "fault").detail
    assert {one.verdict for one in found if one.area in ("weights", "computation", "short run")} == {"skipped"}


@pytest.mark.parametrize(("num_drafts", "verdict"), [(3, "ok"), (7, "ok"), (12, "warning")])
def test_states_of_drafts_are_counted_where_the_verifier_has_mamba_layers(
    num_drafts: int, verdict: Any, tmp_path: Path
) -> None:
    verifier = hybrid(tmp_path / "hybrid")
    found = findings(memory.examine, verifier=verifier, verifier_device="cpu", num_speculative_tokens=num_drafts)
    one = the(found, STATES, verdict)
    assert f"each of {num_drafts} drafts" in one.detail
    assert verdict == "ok" or one.remedy == "--spec-tokens 3 to 7"


def test_a_cache_that_is_not_known_is_said_to_be_so(tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "latent", "verifier", kv_lora_rank=64)
    found = findings(memory.examine, verifier=verifier, verifier_device="cpu")
    assert "latent attention" in the(found, "verifier's cache", "warning").detail


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated device needs a compiler")
def test_on_gpus_every_device_has_its_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = copy_of("twotower", tmp_path / "published")
    (drafter / "config.json").write_text(PUBLISHED_SIZE.to_json())
    with emulated_devices(3):  # of 80 GiB each
        placed = {"verifier_device": "cuda:0", "context_device": "cuda:1", "denoiser_device": "cuda:2"}
        found = findings(memory.examine, drafter, **placed)
        details = {f"cuda:{number}": the(found, f"cuda:{number}", "ok").detail for number in range(3)}
        together = findings(memory.examine, drafter, verifier_device="cuda:0")
        assert "a single request does not fit" in the(together, "cuda:0", "fault").detail
        monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda one, other: False, raising=False)
        crossing = findings(links.examine, drafter, **placed)
    assert "weights" in details["cuda:0"] and "tower" not in details["cuda:0"]
    assert "context tower 58.8" in details["cuda:1"] and "scratch" in details["cuda:1"]
    assert "denoiser tower 58.8" in details["cuda:2"] and "mirror" in details["cuda:2"]
    assert len(crossing) == 6
    assert "by way of the host" in the(crossing, "cuda:1 to cuda:2", "warning").detail


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated device needs a compiler")
def test_ranks_begin_at_the_device_and_those_without_a_gpu_are_one_fault() -> None:
    with emulated_devices(3):
        found = findings(memory.examine, verifier_device="cuda:1", tensor_parallel_size=2)
        too_many = findings(memory.examine, verifier_device="cuda:1", tensor_parallel_size=4)
        elsewhere = findings(memory.examine, verifier_device="cuda", tensor_parallel_size=4, memory_gib=80)
    assert [one.looked_at for one in found] == ["cuda:1", "cuda:2", STATES]
    assert "tower" in the(found, "cuda:1", "ok").detail and "tower" not in the(found, "cuda:2", "ok").detail
    one = the(too_many, "ranks", "fault")
    assert one.detail == "4 ranks of the verifier need cuda:3, cuda:4, this machine has 3 GPUs"
    assert "--tensor-parallel-size" in one.remedy and "--memory-gib" in one.remedy
    assert [one.looked_at for one in elsewhere if one.verdict == "ok"] == [*(f"cuda:{n}" for n in range(4)), STATES]


def test_many_ranks_make_no_long_lines() -> None:
    ranks = {"tensor_parallel_size": 100_000}
    one = the(findings(memory.examine, verifier_device="cpu", memory_gib=10**6, **ranks), "cpu", "ok")
    assert "100000 x verifier's weights" in one.detail and len(one.detail) < 500
    with emulated_devices(1):
        one = the(findings(memory.examine, verifier_device="cuda:0", **ranks), "ranks", "fault")
    assert "need cuda:1 to cuda:99999, this" in one.detail


def test_the_size_of_the_cache_is_that_of_one_rank_and_one_request(tmp_path: Path) -> None:
    verifier = str(hybrid(tmp_path / "hybrid"))
    one = memory.cache_size(Case(str(trio_path("twotower")), verifier, verifier_device="cpu", max_num_seqs=3))
    (keys,) = [
        line
        for line in Case(str(trio_path("twotower")), verifier).memory.lines
        if (line.holder, line.name) == ("verifier", "keys and values")
    ]
    assert one.per_token == keys.num_bytes and one.fixed > 47 * 2**20


def test_experts_of_fewer_bits_fit_where_those_that_are_stored_do_not(tmp_path: Path) -> None:
    drafter = copy_of("twotower", tmp_path / "published")
    (drafter / "config.json").write_text(PUBLISHED_SIZE.to_json())
    for experts_dtype, verdict in ((None, "fault"), ("int8", "ok"), ("int4", "ok")):
        options = {"verifier_device": "cpu", "memory_gib": 80, "experts_dtype": experts_dtype}
        one = the(findings(memory.examine, drafter, **options), "cpu", verdict)
        assert verdict == "ok" or "int4" in one.remedy


def test_one_device_has_no_links() -> None:
    the(findings(links.examine, verifier_device="cpu"), "devices", "ok")
