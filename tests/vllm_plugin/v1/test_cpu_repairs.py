"""Repairs of stock vLLM on a CPU, each beside the fault that it repairs; in a fresh interpreter, which vLLM changes."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import TIGHT, run_engine
from tests.vllm_plugin.installed import needs_the_stock_sampler

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

BEFORE = """
import torch
from types import SimpleNamespace
from vllm.platforms import current_platform
from vllm.v1.worker import cpu_model_runner
from vllm.v1.sample import rejection_sampler
from vllm_twotower.v1 import cpu_repairs

if register := current_platform.register_triton_kernel_overrides:
    register()  # as a worker does before it makes its runner
else:
    cpu_model_runner.CPUModelRunner._postprocess_triton(None)  # up to vLLM 0.30 the runner does it
given, cumulative = torch.tensor([0.3, 0.0, 0.7]), torch.tensor([2, 2, 5], dtype=torch.int32)
wanted = torch.tensor([0.3, 0.3, 0.7, 0.7, 0.7])
greedy_too = torch.tensor([0, 1, 4], dtype=torch.int32)
"""

EXPANSION = """
def expanded():
    # What the memory held before shows through: make it something that is no temperature.
    poisoned = torch.full((5,), -99.0)
    del poisoned
    return rejection_sampler.expand_batch_to_tokens(given, cumulative, 5, replace_from=0, replace_to=1)

stock = expanded()
print("stock right", torch.equal(stock, wanted))
cpu_repairs.install()
print("fixed right", torch.equal(expanded(), wanted))
print("replaced", rejection_sampler.expand_batch_to_tokens(given, greedy_too, 4, 0, 1).tolist()[0] == 1.0)
"""

CONSTRAINTS = """
nothing = torch.zeros(0, 8)
metadata = SimpleNamespace(
    all_greedy=False, temperature=torch.tensor([0.7]), top_k=torch.tensor([3], dtype=torch.int32), top_p=None
)

def constrained():
    try:
        return rejection_sampler.apply_sampling_constraints(nothing, torch.tensor([0], dtype=torch.int32), metadata)
    except RuntimeError as error:
        return error

print("stock right", isinstance(constrained(), torch.Tensor))
cpu_repairs.install()
print("fixed right", torch.equal(constrained(), nothing))
cpu_repairs.install()  # a second time changes nothing
print("replaced", rejection_sampler.apply_sampling_constraints.__module__ == "vllm_twotower.v1.cpu_repairs")
"""


@needs_the_stock_sampler()
@pytest.mark.parametrize("code", [EXPANSION, CONSTRAINTS], ids=["expand_batch_to_tokens", "apply_sampling_constraints"])
def test_the_stock_function_is_wrong_and_ours_is_right(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code], capture_output=True, text=True, timeout=120, check=False
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("stock", "fixed", "replaced"))]
    assert said == ["stock right False", "fixed right True", "replaced True"], done.stdout + done.stderr


@pytest.mark.slow
def test_a_seed_and_a_prompt_in_pieces_end_stock_vllm_and_give_the_same_text_as_at_once_with_ours() -> None:
    found = run_engine(["seed_and_a_prompt_in_pieces"], None, **TIGHT)["seed_and_a_prompt_in_pieces"]
    assert "does not use offset" in found["stock"]
    in_pieces, at_once = found["repaired"]
    assert found["hits"] >= 128
    assert in_pieces == at_once
