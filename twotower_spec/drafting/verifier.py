"""The target: a causal language model of transformers that reads drafts, and forgets the rejected ones."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from twotower_spec.state.transfer import to_device

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Verifier:
    """A target and what it has read of several rows.

    Where every layer keeps plain keys and values, the cache is cut back to the accepted tokens; a row that kept fewer
    than another of its batch has its surplus masked out. Other targets (sliding windows, linear attention, positions
    counted by the model itself) cannot be cut back: the rows are then read anew in every round, which is slow and said.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        """Remembers the prompts, and reads nothing yet.

        Args:
            model: any causal language model.
            prompts: at least one token each; all but the last tokens are read with the first `read`.
        """
        self.model, self.device = model, torch.device(model.device)
        self.num_passes = 0
        self.cache: DynamicCache | None = DynamicCache(config=model.config)
        # Rows of a batch keep different numbers of tokens: the model must take the positions that it is told.
        understood = {"past_key_values", "position_ids"} <= set(inspect.signature(model.forward).parameters)
        if not understood or not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            self._without_cache()
        self._rows = [list(prompt[:-1]) for prompt in prompts]
        self._mask = torch.zeros(len(prompts), 0, dtype=torch.long, device=self.device)
        self._lengths = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        self._fresh = True
        self._start = 0

    @torch.inference_mode()
    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Reads on in every row.

        Args:
            tokens: at least one per row.

        Returns:
            Logits float32 [num_rows, longest, vocab] after each of them; undefined beyond a row's own number.
        """
        self.num_passes += 1
        longest = max(map(len, tokens))
        if self.cache is None:
            return self._read_anew(tokens, longest)
        # The first time, prompts stand before the tokens, padded on the left.
        first = self._fresh
        before = self._rows if first else [[] for _ in tokens]
        self._fresh = False
        width = max(map(len, before))
        ids = [
            [0] * (width - len(head)) + head + list(new) + [0] * (longest - len(new))
            for head, new in zip(before, tokens, strict=True)
        ]
        valid = [
            [0] * (width - len(head)) + [1] * (len(head) + len(new)) + [0] * (longest - len(new))
            for head, new in zip(before, tokens, strict=True)
        ]
        new_mask = to_device(valid, self.device)
        positions = (self._lengths[:, None] + new_mask.cumsum(1) - 1).clamp(min=0)
        self._start = self._mask.shape[1] + width
        self._mask = torch.cat([self._mask, new_mask], dim=1)
        out = self.model(
            input_ids=to_device(ids, self.device),
            attention_mask=None if bool(self._mask.all()) else self._mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=longest,
        )
        self._lengths += to_device([len(head) for head in before], self.device)
        if first and not all(isinstance(layer, DynamicLayer) and layer.keys is not None for layer in self.cache.layers):
            self._without_cache()  # the model has put nothing into it
        logits: Tensor = out.logits[:, -longest:].float()
        return logits

    def keep(self, num_kept: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Forgets all but the first tokens of the last `read`, per row.

        Args:
            num_kept: of the tokens, per row.
            tokens: as `read` was given them.
        """
        for row, kept, new in zip(self._rows, num_kept, tokens, strict=True):
            row.extend(new[:kept])
        if self.cache is None:
            return
        counts = to_device(list(num_kept), self.device)
        end = self._start + max(num_kept)
        self._lengths += counts
        self._cut(end)
        surplus = torch.arange(end, device=self.device) >= self._start + counts[:, None]
        self._mask = self._mask.masked_fill(surplus, 0)

    def forget(self, num_tokens: int) -> None:
        """Forgets the newest tokens of every row, each read and kept for all rows alike."""
        if num_tokens:
            for row in self._rows:
                del row[-num_tokens:]
            self._cut(self._mask.shape[1] - num_tokens)
            self._lengths -= num_tokens

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some of the rows, in the given order."""
        self._rows = [self._rows[row] for row in rows]
        index = to_device(list(rows), self.device)
        self._mask, self._lengths = self._mask[index], self._lengths[index]
        if not self._fresh:
            self._keep_of_cache(lambda kept: kept[index.to(kept.device)])

    def _without_cache(self) -> None:
        self.cache = None
        logger.warning(
            "%s keeps state that cannot be cut back to accepted tokens; every round reads all tokens anew",
            type(self.model).__name__,
        )

    def _cut(self, end: int) -> None:
        """Keeps the first `end` columns of mask and cache."""
        self._mask = self._mask[:, :end]
        self._keep_of_cache(lambda kept: kept[..., :end, :])

    def _keep_of_cache(self, part: Callable[[Tensor], Tensor]) -> None:
        """Replaces keys and values [num_rows, heads, tokens, head_dim] of every layer by a part of them."""
        for layer in self.cache.layers if self.cache is not None else ():
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
            layer.keys, layer.values = part(layer.keys), part(layer.values)

    def _read_anew(self, tokens: Sequence[Sequence[int]], longest: int) -> Tensor:
        whole = [[*row, *new] for row, new in zip(self._rows, tokens, strict=True)]
        width = max(map(len, whole))
        ids = to_device([row + [0] * (width - len(row)) for row in whole], self.device)
        mask = to_device([[1] * len(row) + [0] * (width - len(row)) for row in whole], self.device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        starts = to_device([len(row) for row in self._rows], self.device)
        at = (starts[:, None] + torch.arange(longest, device=self.device)).clamp(max=width - 1)
        picked: Tensor = logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[-1])).float()
        return picked
