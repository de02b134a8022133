"""Arguments of the scan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScanWeights:
    """Parameters of one Mamba-2 layer that the scan reads.

    Attributes:
        conv_weight: [channels, taps]; the last tap multiplies the current token.
        conv_bias: [channels] or None.
        a_log: [heads]; the decay rate of a head is `-exp(a_log)`. This and the next two in the dtype of the SSM state.
        d: [heads], skip connection.
        dt_bias: [heads], added to the time step before softplus.
        num_groups: consecutive heads share B and C of one group.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    d: Tensor
    dt_bias: Tensor
    num_groups: int
