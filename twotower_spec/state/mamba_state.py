"""Convolution histories and SSM states of the Mamba layers, one slot per request."""

import torch
from torch import Tensor

from twotower_kernels.block_scan import ScanWeights, pool_scan
from twotower_spec.config import TwoTowerConfig, accumulation_dtype
from twotower_spec.state.transfer import to_device

Slots = Tensor | slice


class MambaState:
    """States of all Mamba layers.

    Attributes:
        conv: [num_mamba_layers, num_slots, taps - 1, d_conv_channels], raw convolution inputs, oldest first.
        ssm: [num_mamba_layers, num_slots, heads, head_dim, state_size], float32 (float64 in a float64 model).
    """

    def __init__(self, config: TwoTowerConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        layers = len(config.mamba_layers)
        conv_shape = (layers, num_slots, config.conv_kernel - 1, config.d_conv_channels)
        ssm_shape = (layers, num_slots, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.conv = torch.zeros(conv_shape, dtype=dtype, device=device)
        self.ssm = torch.zeros(ssm_shape, dtype=accumulation_dtype(dtype), device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.conv.nbytes + self.ssm.nbytes

    def index(self, slots: list[int]) -> Slots:
        """Index for a list of slots: on a CPU a slice (reads become views) where they are consecutive."""
        if self.conv.device.type == "cpu" and slots == list(range(slots[0], slots[0] + len(slots))):
            return slice(slots[0], slots[0] + len(slots))
        return to_device(slots, self.conv.device)

    def scan(
        self,
        layer: int,
        slots: Slots,
        u: Tensor,
        delta: Tensor,
        weights: ScanWeights,
        query_lens: Tensor | None = None,
        new_conv: Tensor | None = None,
    ) -> Tensor:
        """Runs a Mamba layer, counted among its kind, over blocks from the states of some slots; see `pool_scan`."""
        return pool_scan(u, delta, self.conv[layer], self.ssm[layer], slots, weights, query_lens, new_conv)

    def reset(self, slot: int) -> None:
        """The state at the start of a sequence."""
        self.conv[:, slot] = 0
        self.ssm[:, slot] = 0


class MambaAdvance:
    """A pass that takes the states of some slots on. SSM states are written by its scans, where they lie.

    Convolution histories, which all programs of a scan read, are written at its end: all layers at once.
    """

    def __init__(self, mamba: MambaState, slots: Slots, num_reqs: int) -> None:
        """Begins a pass; `slots` are those of `num_reqs` requests."""
        self._mamba, self._slots = mamba, slots
        num_layers, _, *history = mamba.conv.shape
        self._new_conv = mamba.conv.new_empty(num_layers, num_reqs, *history)

    def scan(
        self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights, query_lens: Tensor | None = None
    ) -> Tensor:
        """Runs a Mamba layer, counted among its kind, over new tokens; see `pool_scan`."""
        return self._mamba.scan(layer, self._slots, u, delta, weights, query_lens, self._new_conv[layer])

    def finish(self) -> None:
        """Writes the histories, once every Mamba layer has run."""
        self._mamba.conv[:, self._slots] = self._new_conv
