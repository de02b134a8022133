import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Imports a package with all its submodules and prints the top-level names that are then loaded. `__main__` modules are
# left out: importing one would run its command.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
print("\\n".join({name.partition(".")[0] for name in sys.modules}))
"""

IMPORT_PACKAGE_ONLY = """
import importlib, sys
importlib.import_module(sys.argv[1])
print("\\n".join({name.partition(".")[0] for name in sys.modules}))
"""

BUILD_COMMAND_LINE = """
import sys
from twotower_spec.cli.app import build_app
build_app()
print("\\n".join(sys.modules))
"""


def loaded_names(code: str, *arguments: str) -> set[str]:
    """Runs `code` in a fresh interpreter and returns what it says is loaded."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "vllm_plugin", "benchmarks"))
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("twotower_kernels", {"transformers", "vllm", "vllm_twotower", "twotower_bench", "twotower_spec"}),
        ("twotower_spec", {"vllm", "vllm_twotower", "twotower_bench"}),
    ],
)
def test_package_imports_nothing_that_stands_above_it(package: str, above: set[str]) -> None:
    loaded = loaded_names(IMPORT_EVERYTHING, package)
    assert package in loaded
    assert not loaded & above


def test_importing_vllm_twotower_does_not_import_vllm() -> None:
    """vLLM loads it while starting, and `cpu_install` runs where vLLM cannot be imported."""
    loaded = loaded_names(IMPORT_PACKAGE_ONLY, "vllm_twotower")
    assert "vllm_twotower" in loaded
    assert "vllm" not in loaded


def test_the_command_line_starts_without_what_few_commands_need() -> None:
    """transformers' models alone double the time until `--help` or a refused option is answered."""
    loaded = loaded_names(BUILD_COMMAND_LINE)
    assert "twotower_spec.cli.app" in loaded
    assert not loaded & {"transformers.modeling_utils", "matplotlib", "pandas", "scipy", "sklearn", "vllm"}


@pytest.mark.parametrize("folder", ["kernels", "vllm_plugin", "benchmarks"])
def test_folder_that_holds_a_package_is_not_a_package_itself(folder: str) -> None:
    """An `__init__.py` in kernels/ would hide the PyPI package `kernels`, which transformers imports."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_plugin_imports_nothing_of_the_benchmarks() -> None:
    """A server loads the plugin alone. Its sources are read: importing all of it would import vLLM."""
    for file in sorted((ROOT / "vllm_plugin" / "vllm_twotower").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("twotower_bench") for name in names), file
