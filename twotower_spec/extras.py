"""Optional packages, which come with an extra of this one."""

from __future__ import annotations

from importlib.util import find_spec

from twotower_spec.errors import ArgumentError


def require_extra(extra: str, *modules: str) -> None:
    """Checks that the packages of an extra are there, before any work is done.

    Raises:
        ArgumentError: one is not.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ArgumentError(
                f"package {module!r} is not installed; install it with: pip install 'twotower-spec[{extra}]'"
            )
