import os
import shutil
from collections.abc import Iterator

import pytest

from tests.support.command_line import command  # noqa: F401
from tests.support.interpreter import interpret_kernels

# Beginnings of names of variables that we or engines read; libraries set others where they are imported.
READ_VARIABLES = ("CUDA_", "OMP_", "ONEDNN_", "PYTHON", "TRITON_INTERPRET", "TWOTOWER_", "VLLM_")

# Before any test imports a kernel. With a driver the kernels run on the device instead, and where gpu.sh has seen that
# there is one: nvidia-smi need not be on PATH, and nothing would say that the interpreter ran.
if shutil.which("nvidia-smi") is None and os.environ.get("KERNEL_TESTS") != "cuda":
    interpret_kernels()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device; files with slow tests come first where several run."""
    if hasattr(config, "workerinput"):  # so that the quick ones fill up the end, and all workers finish together
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # Imported here, so that a run without such tests does not wait for torch.
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Fails a test that leaves variables behind, which the engines of later tests would inherit."""
    before = dict(os.environ)
    yield
    changed = {name for name, _ in before.items() ^ os.environ.items() if name.startswith(READ_VARIABLES)}
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    assert not changed, f"left changed behind: {sorted(changed)}"
