"""The context tower: a causal pass over committed tokens."""

from collections.abc import Iterator

from torch import Tensor

from twotower_spec.towers.backbone import Backbone
from twotower_spec.towers.layers.weights import prefixed


class ContextTower(Backbone):
    """The frozen autoregressive tower. Its prefix is a state pass that writes what it computes (see `state`).

    `forward(token_ids, prefix, positions=...)` extends the context by the given tokens and returns the logits at the
    chosen positions; an empty `positions` skips whatever only logits would need.
    """

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names, the tower's own head included."""
        yield from prefixed("context_tower", super().checkpoint_tensors())
        yield "context_lm_head.weight", self.head
