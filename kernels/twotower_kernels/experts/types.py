"""Arguments of routing and of experts, and what these give."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertChoice:
    """Parameters by which tokens choose and weigh experts.

    Attributes:
        top_k: experts per token.
        num_groups, top_groups: with more than one group, only the `top_groups` groups with the largest sum of their
            two best corrected scores stay eligible; the others' corrected scores become 0.
        normalise: divide the weights of a token by their sum.
        scale: factor on all weights.
    """

    top_k: int
    num_groups: int
    top_groups: int
    normalise: bool
    scale: float


@dataclass(frozen=True)
class ExpertScales:
    """Factors of quantised experts.

    Attributes:
        up: of output channels, float32 [num_experts, width]; of groups of 64 inputs, bfloat16
            [num_experts, width, cdiv(hidden, 64)], with weights of 4 bits.
        down: float32 [num_experts, hidden], or bfloat16 [num_experts, hidden, cdiv(width, 64)].
    """

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class SharedExpert:
    """Weights of the expert that every token passes.

    Attributes:
        up: [width, hidden], any width.
        down: [hidden, width].
    """

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class ExpertOutputs:
    """Outputs of the experts of each token, before they are weighed and summed.

    `twotower_kernels.time_modulation.add_then_norm` does both as it adds the sum to a residual stream.

    Attributes:
        chosen: [num_tokens, top_k, hidden].
        weights: [num_tokens, top_k]; the sum over experts runs in this dtype.
        shared: [num_tokens, hidden], output of a shared expert, added unscaled to the sum once that is rounded; or
            None.
    """

    chosen: Tensor
    weights: Tensor
    shared: Tensor | None

    def total(self) -> Tensor:
        """The weighed sum, [num_tokens, hidden] in the dtype of the outputs."""
        routed = torch.bmm(self.weights[:, None], self.chosen.to(self.weights.dtype))[:, 0].to(self.chosen.dtype)
        return routed if self.shared is None else routed + self.shared
