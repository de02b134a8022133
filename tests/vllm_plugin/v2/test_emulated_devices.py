"""Steps of model runner V2 on emulated devices: what a CPU gives, from the device alone, and no wait for it."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.fork_server import ROOT, TESTED_VERSION, TRITON_ON_CPU, engine_environment

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.skipif(TESTED_VERSION in os.environ, reason="needs the environment's vLLM"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"),
    pytest.mark.slow,
]

PARAMS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.0}],
    "changed logits": [
        {"temperature": 0.0, "logit_bias": {5: 9.0}, "logprobs": 2},
        {"temperature": 0.8, "seed": 3, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 0.8, "seed": 4, "presence_penalty": 1.0, "logprob_token_ids": [3, 8]},
    ],
}
# What is asked for, where the verifier and the denoiser are, and the rule.
CASES = [
    ("plain", "cuda:0", "cuda:1", "one-hot"),
    ("changed logits", "cuda:0", "cuda:0", "coupled"),
]
OURS = ("judge_rows_kernel", "settle_requests_kernel")

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Steps, Steps]]:
    """Steps on a CPU and on devices, of every case: prompts are read, in part or whole, and then drafts verified."""
    runs = [
        {"device": place[0], "denoiser_device": place[1], "params": PARAMS[asked], "rule": rule}
        for asked, *devices, rule in CASES
        for place in (("cpu", "cpu"), devices)
    ]
    file = tmp_path_factory.mktemp("steps") / "steps.json"
    paths = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "vllm_plugin", "benchmarks"))]
    variables = {**engine_environment(), **TRITON_ON_CPU}
    variables["PYTHONPATH"] = os.pathsep.join([*paths, TRITON_ON_CPU["PYTHONPATH"]])
    command = [sys.executable, "-m", "tests.vllm_plugin.v2.emulated", json.dumps(runs), str(file)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = json.loads(file.read_text())
    return list(zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(", ".join, CASES))
@pytest.mark.parametrize("what", ["tokens", "drafts", "logprobs"])
def test_steps_give_what_they_give_on_a_cpu(what: str, case: int, found: list[tuple[Steps, Steps]]) -> None:
    on_cpu, on_devices = found[case]
    assert [step[what] for step in on_devices] == [step[what] for step in on_cpu]


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(", ".join, CASES))
def test_no_step_waits_for_a_device(case: int, found: list[tuple[Steps, Steps]]) -> None:
    assert [step["waits"] for step in found[case][1]] == [{}] * 4


def test_drafts_were_accepted_and_every_request_got_drafts_of_its_own(found: list[tuple[Steps, Steps]]) -> None:
    steps = found[0][1]
    assert [len(step["tokens"][0]) for step in steps] == [1, 2, 2, 2]
    assert [len(step["tokens"][2]) for step in steps] == [0, 1, 1, 1]  # the first reads a part of its prompt
    assert len({tuple(row) for step in steps for row in step["drafts"]}) == 12


def test_a_steady_step_launches_two_kernels_of_ours_and_two_of_vllm(found: list[tuple[Steps, Steps]]) -> None:
    kernels = found[0][1][-1]["kernels"]
    assert [kernels[name] for name in OURS] == [1, 1] and sum(kernels.values()) == 4
