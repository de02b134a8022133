"""The drafter in memory, to compute with: all of it where it is small, else the first layer of each kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twotower_spec.checkpoint import CheckpointIndex, load_tensors
from twotower_spec.config import TwoTowerConfig
from twotower_spec.model import stored_dtype
from twotower_spec.towers.model import TwoTowers

# Stored bytes up to which a checkpoint is read whole.
SMALL = 2 << 30
_LAYER = re.compile(r"(?<=\.layers\.)\d+|(?<=^scale_shift_tables\.)\d+")


@dataclass(frozen=True)
class Sample:
    """Both towers with some of their layers.

    Attributes:
        towers: a model of these layers, in the stored dtype.
        layers: their numbers in the checkpoint.
        names: of all their tensors in the checkpoint.
        is_whole: whether these are all layers.
    """

    towers: TwoTowers
    layers: tuple[int, ...]
    names: frozenset[str]
    is_whole: bool


def load_sample(
    config: TwoTowerConfig, index: CheckpointIndex, context_device: str = "cpu", denoiser_device: str = "cpu"
) -> Sample:
    """Loads the layers of a sample onto the devices that serve them.

    Args:
        config, index: of a checkpoint whose tensors are those that the configuration makes.
        context_device, denoiser_device: of the towers.
    """
    kinds = config.layer_kinds
    is_whole = sum(stored.nbytes for stored in index.values()) <= SMALL
    layers = tuple(range(len(kinds))) if is_whole else tuple(sorted(kinds.index(kind) for kind in set(kinds)))
    chosen = config.replace(
        hybrid_override_pattern="".join(kinds[layer] for layer in layers), num_hidden_layers=len(layers)
    )
    towers = TwoTowers(chosen, stored_dtype(index, config), context_device, denoiser_device)
    destinations = {_renumbered(name, layers): tensor for name, tensor in towers.checkpoint_tensors()}
    with torch.no_grad():
        load_tensors(index, destinations, ignored=index.keys() - destinations.keys())
    return Sample(towers, layers, frozenset(destinations), is_whole)


def _renumbered(name: str, layers: Sequence[int]) -> str:
    return _LAYER.sub(lambda number: str(layers[int(number[0])]), name)
