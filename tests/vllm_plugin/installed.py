"""Features of the vLLM of these tests, read from sources: to import it would change the process of the tests."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest


def source_of(file: str) -> str:
    """Text of a file, `vllm/sampling_params.py`."""
    found = find_spec("vllm")
    assert found is not None and found.origin is not None
    return (Path(found.origin).parents[1] / file).read_text(encoding="utf-8")


def fields_of(file: str, owner: str) -> list[str]:
    """Annotated fields of a class in a file."""
    tree = ast.parse(source_of(file))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    return [one.target.id for one in body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]


def tells_acceptance_per_request() -> bool:
    """Whether requests can ask how their drafts were accepted, as from vLLM 0.30 on."""
    return "per_request_spec_decode_metrics" in fields_of("vllm/engine/arg_utils.py", "EngineArgs")


def ends_at_stop_strings() -> bool:
    """Whether a step that commits several tokens leaves out those behind a stop string, as from vLLM 0.32 on.

    Before, they stay among the token ids, and `min_tokens` counts whole steps, whatever drafts them.
    """
    return "Drop tokens generated after the one completing the stop string" in source_of(
        "vllm/v1/engine/detokenizer.py"
    )


def keeps_allowed_tokens_apart() -> bool:
    """Whether a request keeps its own `allowed_token_ids` when rows of a batch change places, as from vLLM 0.31 on.

    Before, both rows have the mask of one of them afterwards: the swap reads what it has just written.
    """
    return "allowed_token_ids_mask_cpu_tensor[[i1, i2]]" in source_of("vllm/v1/worker/gpu_input_batch.py")


def samples_on_a_cpu() -> bool:
    """Whether vLLM's own rejection sampler runs on a CPU; that of 0.30 ends its engine.

    Its kernel's configuration holds the function that the runner then replaces by one that cannot be inspected.
    """
    replaced = "rejection_sampler.rejection_greedy_sample_kernel = (" in source_of("vllm/v1/worker/cpu_model_runner.py")
    configured = "kernel=rejection_greedy_sample_kernel" in source_of("vllm/v1/sample/rejection_sampler.py")
    return not (replaced and configured)


def needs_the_stock_sampler() -> pytest.MarkDecorator:
    """Skips tests that hand over to vLLM's own rejection sampler where that cannot run."""
    here = find_spec("vllm") is not None
    return pytest.mark.skipif(
        here and not samples_on_a_cpu(), reason="this vLLM's own sampler ends its engine on a CPU"
    )
