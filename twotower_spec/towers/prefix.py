"""Interface by which a tower reads the tokens before its own: one scan or one attention call per layer."""

from typing import Protocol

from torch import Tensor

from twotower_kernels.block_scan import ScanWeights


class Prefix(Protocol):
    """Context that a pass runs on. It owns the state; the layers own the weights.

    Tensors of a pass are [num_reqs, num_tokens, width] when all requests bring the same number of tokens, and
    [1, num_tokens, width], request after request, when they do not.
    """

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs the Mamba-2 recurrence of layer `layer` on from the context's state.

        Args:
            layer: index of the layer in the tower.
            u: [..., d_conv_channels], raw convolution inputs.
            delta: [..., heads], raw time steps.
            weights: parameters of the scan.

        Returns:
            [..., d_inner], float32 (float64 in a float64 model).
        """
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to the context's keys of layer `layer` and to the pass's own.

        Args:
            layer: index of the layer in the tower.
            query: [..., heads, head_dim].
            key, value: [..., kv_heads, head_dim].

        Returns:
            [..., heads, head_dim].
        """
        ...
