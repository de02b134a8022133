"""Structure of the kernels' files, checked on their syntax trees."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "kernels" / "twotower_kernels"


def module_of(file: Path) -> str:
    parts = ["twotower_kernels", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ROOT.rglob("*.py"))}
KERNELS = [name for name in TREES if name.endswith(".kernel")]


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def launchers(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions that launch a kernel: `kernel[grid](...)`."""
    kernels = {function.name for function in functions(tree) if is_kernel(function)}
    return [
        function
        for function in functions(tree)
        if any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and ast.unparse(node.func.value) in kernels
            for node in ast.walk(function)
        )
    ]


@pytest.mark.parametrize("module", KERNELS)
def test_every_function_that_launches_a_kernel_makes_the_tensors_device_current(module: str) -> None:
    found = launchers(TREES[module])
    assert found, f"{module} launches nothing"
    unguarded = [
        function.name
        for function in found
        if "on_its_device" not in [ast.unparse(decorator) for decorator in function.decorator_list]
    ]
    assert unguarded == []


def imports(module: str) -> set[str]:
    """Modules of the kernels that a module imports, inside its functions too."""
    found: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in TREES else node.module
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & TREES.keys()


def test_no_modules_of_the_kernels_import_each_other() -> None:
    TopologicalSorter({module: imports(module) for module in TREES}).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("module", KERNELS)
def test_settings_to_try_and_variants_to_compile_stand_beside_the_kernel(module: str) -> None:
    beside = TREES[module.replace(".kernel", ".variants")]
    defined = {ast.unparse(node.target) for node in beside.body if isinstance(node, ast.AnnAssign)}
    assert "CANDIDATES" in defined and "variants" in [function.name for function in functions(beside)]
    assert "twotower_kernels.compilation" not in imports(module)
