"""Compiler that compiles nothing: kernels run in the interpreter."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):  # type: ignore[misc]
    """Backend whose presence is asked for, and nothing else."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        """Whether it is this one."""
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        """Part of the key of Triton's cache."""
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> object:
        """Options of a compilation, of which there is none."""
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: Any = None) -> None:
        """Stages of a compilation, of which there is none."""
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """Nothing to load."""

    def get_module_map(self) -> dict[str, Any]:
        """Nothing to map."""
        return {}
