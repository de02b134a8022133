"""vLLM integration of twotower-spec: a TwoTower model as the drafter of `vllm serve` and `LLM()`.

vLLM loads this package as a plugin while it starts, in every one of its processes, and `vllm_twotower.cpu_install` runs
where vLLM cannot be imported: importing `vllm_twotower` never imports vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_twotower.v1.proposer import TwoTowerProposer

__all__ = ["TwoTowerProposer", "register"]


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: lets vLLM's settings name a TwoTower checkpoint.

    Called several times in several processes. Never raises: a vLLM without the hooks runs on without drafts, with one
    warning.
    """
    from vllm_twotower import routing
    from vllm_twotower.model import registration as context_tower
    from vllm_twotower.v2 import registration as speculator

    routing.install()
    context_tower.install()
    speculator.install()


def __getattr__(name: str) -> Any:
    """`TwoTowerProposer`, imported when it is first asked for: it needs vLLM."""
    if name == "TwoTowerProposer":
        from vllm_twotower.v1.proposer import TwoTowerProposer

        return TwoTowerProposer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
