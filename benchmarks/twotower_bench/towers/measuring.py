"""Times of a pass, eager, by part and as a graph, and the bytes that it has to read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower_bench.towers.capture import captured
from twotower_bench.towers.clock import DeviceClock
from twotower_bench.towers.passes import PassShape, TowerPass
from twotower_spec.config import ATTENTION, MAMBA, MLP, MOE, TwoTowerConfig
from twotower_spec.errors import first_line
from twotower_spec.towers.backbone import Backbone, Layer
from twotower_spec.towers.layers import MixtureOfExperts

# Layers with their norms and residuals.
PARTS = {MOE: "experts", MAMBA: "Mamba", ATTENTION: "attention", MLP: "MLP"}
REST = "head, rest"
NO_CUDA = "graphs are of CUDA devices"


@dataclass(frozen=True)
class PassTimes:
    """Times of a pass; all are medians in seconds.

    Attributes:
        shape: what it is of.
        num_context_tokens: of each request.
        eager_s: called as it is.
        host_s: how long the host was busy with that; where it is as much, the device waited for the host.
        graph_s: replayed from a CUDA graph; None where it was not captured.
        no_graph: why it was not.
        parts_s: of the device, by kind of layer.
        num_bytes: weights, keys and states that the pass has to read.
        num_visited_experts: mean over the layers that have experts.
        copy_bytes_per_s: read and written by a copy inside the device's memory.
    """

    shape: PassShape
    num_context_tokens: int
    eager_s: float
    host_s: float
    graph_s: float | None
    no_graph: str
    parts_s: Mapping[str, float]
    num_bytes: int
    num_visited_experts: float
    copy_bytes_per_s: float

    @property
    def floor_s(self) -> float:
        """Time of the bytes at the speed of a copy."""
        return self.num_bytes / self.copy_bytes_per_s


@torch.inference_mode()
def measure(one: TowerPass, clock: DeviceClock, config: TwoTowerConfig, num_context_tokens: int) -> PassTimes:
    """Measures a pass."""
    visited = visited_experts(one)
    eager = clock.time(one.call)
    parts: dict[nn.Module, str] = {layer: PARTS[config.layer_kinds[layer.index]] for layer in _layers(one.tower)}
    graph_s, no_graph = _graph_seconds(one, clock)
    return PassTimes(
        one.shape,
        num_context_tokens,
        eager.seconds,
        eager.host_s,
        graph_s,
        no_graph,
        clock.by_part(one.call, parts, REST, eager.host_s),
        weight_bytes_read(one.tower, visited) + one.bytes_of_requests,
        sum(visited.values()) / max(len(visited), 1),
        clock.bytes_per_s,
    )


def visited_experts(one: TowerPass) -> dict[int, int]:
    """Makes a pass, and counts by layer the experts that were chosen in it."""
    chosen: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in _layers(one.tower):
            mixer = layer.mixer
            if isinstance(mixer, MixtureOfExperts):

                def note(module: nn.Module, inputs: tuple[Tensor, ...], index: int = layer.index) -> None:
                    assert isinstance(module, MixtureOfExperts)
                    chosen[index] = module.route(inputs[0].flatten(0, -2))[0]

                hooks.callback(mixer.register_forward_pre_hook(note).remove)
        one.call()
    return {index: len(set(expert_ids.flatten().tolist())) for index, expert_ids in chosen.items()}


def weight_bytes_read(tower: Backbone, visited: Mapping[int, int]) -> int:
    """Bytes of weights that a pass reads: all but the embeddings, of which it looks up a few, and unvisited experts.

    Args:
        tower: that runs.
        visited: experts by layer.
    """
    num_bytes = tower.norm_f.nbytes + tower.head.nbytes
    for layer in _layers(tower):
        num_bytes += sum(parameter.nbytes for parameter in layer.parameters())
        if isinstance(layer.mixer, MixtureOfExperts):
            unvisited = len(layer.mixer.up) - visited[layer.index]
            num_bytes -= unvisited * (layer.mixer.up[0].nbytes + layer.mixer.down[0].nbytes)
    return num_bytes


def _graph_seconds(one: TowerPass, clock: DeviceClock) -> tuple[float | None, str]:
    """Seconds of a pass from a graph, or why there are none."""
    if clock.device.type != "cuda":
        return None, NO_CUDA
    try:
        with torch.cuda.device(clock.device):
            return clock.time(captured(one.call)).seconds, ""
    except RuntimeError as error:
        return None, first_line(error)


def _layers(tower: Backbone) -> list[Layer]:
    return [layer for layer in tower.layers if isinstance(layer, Layer)]
