"""Features of the vLLM of these tests, read from sources: to import it would change the process of the tests."""

import ast
from importlib.util import find_spec
from pathlib import Path


def fields_of(file: str, owner: str) -> list[str]:
    """Annotated fields of a class in a file, `vllm/sampling_params.py`."""
    found = find_spec("vllm")
    assert found is not None and found.origin is not None
    tree = ast.parse((Path(found.origin).parents[1] / file).read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    return [one.target.id for one in body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]


def tells_acceptance_per_request() -> bool:
    """Whether requests can ask how their drafts were accepted, as from vLLM 0.30 on."""
    return "per_request_spec_decode_metrics" in fields_of("vllm/engine/arg_utils.py", "EngineArgs")
