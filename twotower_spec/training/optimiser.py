"""Muon for hidden matrices, AdamW for the rest, over any layout the weights are held in."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from twotower_spec.training.recipe import TrainingConfig

# Published names of both model families; embeddings, heads, routers, convolutions and time MLPs are not among them.
HIDDEN_MATRIX = re.compile(r"\.([qkvo]|in|out|up|down|gate)_proj\.weight$")


class Optimiser:
    """Muon and AdamW, their schedule and gradient clipping.

    Weights are optimised under their published names, so that a fused or stacked parameter is several matrices to Muon.
    Each is a leaf that shares memory with the parameter, as does its gradient with the parameter's.

    Args:
        module: its parameters get gradients.
        tensors: the weights to train, as views of the module's parameters, by name.
        config: learning rates and schedule.
    """

    def __init__(self, module: nn.Module, tensors: Iterable[tuple[str, Tensor]], config: TrainingConfig) -> None:
        self.config = config
        self._owners: list[nn.Parameter] = []
        owners: dict[int, nn.Parameter] = {}
        self.leaves: dict[str, nn.Parameter] = {}
        by_storage = {p.untyped_storage().data_ptr(): p for p in module.parameters()}
        for name, view in tensors:
            owner = by_storage[view.untyped_storage().data_ptr()]
            if id(owner) not in owners:
                owners[id(owner)] = owner
                owner.requires_grad_(True)
                owner.grad = torch.zeros_like(owner)
            assert owner.grad is not None and owner.grad.stride() == owner.stride()
            leaf = nn.Parameter(view.detach())
            offset = view.storage_offset() - owner.storage_offset()
            leaf.grad = owner.grad.as_strided(view.size(), view.stride(), offset)
            self.leaves[name] = leaf
        self._owners = list(owners.values())
        hidden = [leaf for name, leaf in self.leaves.items() if HIDDEN_MATRIX.search(name) and leaf.dim() == 2]
        rest = [leaf for name, leaf in self.leaves.items() if not (HIDDEN_MATRIX.search(name) and leaf.dim() == 2)]
        self._optimisers: list[torch.optim.Optimizer] = []
        if hidden:
            self._optimisers.append(torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
        if rest:
            self._optimisers.append(torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0))
        self._peaks = [group["lr"] for optimiser in self._optimisers for group in optimiser.param_groups]

    def step(self, step: int) -> float:
        """Applies the gradients at the rate of step `step`, counted from 0, and clears them; returns their norm."""
        scale = self.scale(step)
        groups = [group for optimiser in self._optimisers for group in optimiser.param_groups]
        for group, peak in zip(groups, self._peaks, strict=True):
            group["lr"] = peak * scale
        norm = nn.utils.clip_grad_norm_(self._owners, self.config.clip_norm)
        for optimiser in self._optimisers:
            optimiser.step()
        for owner in self._owners:
            assert owner.grad is not None
            owner.grad.zero_()
        return float(norm)

    def scale(self, step: int) -> float:
        """Share of the peak learning rate: linear warm-up, constant, linear decay to zero at the last step."""
        config = self.config
        warmup = max(1.0, config.warmup * config.steps)
        decay = max(1.0, config.decay * config.steps)
        return min(1.0, (step + 1) / warmup, (config.steps - step) / decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors of both optimisers' states, by name."""
        return {
            f"optimiser.{i}.{index}.{name}": value
            for i, optimiser in enumerate(self._optimisers)
            for index, entries in optimiser.state_dict()["state"].items()
            for name, value in entries.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        for i, optimiser in enumerate(self._optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                _, number, index, entry = name.split(".", 3)
                if int(number) == i:
                    state.setdefault(int(index), {})[entry] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
