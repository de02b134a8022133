"""Passes of both towers over requests whose contexts are there, again and again the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_spec.state import ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE
from twotower_spec.state.window import ContextWindows, TokenTable
from twotower_spec.towers.backbone import Backbone
from twotower_spec.towers.model import TwoTowers


@dataclass(frozen=True)
class PassShape:
    """Kind and size of a pass.

    Attributes:
        kind: a denoising step, or an extension of contexts.
        num_reqs: requests together.
        num_tokens: of each request: the block's, or those that are read.
    """

    kind: Literal["step", "extension"]
    num_reqs: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.num_reqs} x {self.num_tokens}"


@dataclass(frozen=True)
class TowerPass:
    """A pass that can be made any number of times, with the same work each time.

    Attributes:
        shape: what it is of.
        tower: that runs.
        call: makes it.
        bytes_of_requests: keys and states that it has to read.
    """

    shape: PassShape
    tower: Backbone
    call: Callable[[], object]
    bytes_of_requests: int


def planned(num_reqs: Sequence[int], block_sizes: Sequence[int], num_new_tokens: Sequence[int]) -> list[PassShape]:
    """Lists passes, few requests and large blocks first: a run that is cut short has the most telling ones."""
    shapes: list[PassShape] = []
    for count in sorted(set(num_reqs)):
        shapes += [PassShape("step", count, size) for size in sorted(set(block_sizes), reverse=True)]
        shapes += [PassShape("extension", count, new) for new in sorted(set(num_new_tokens))]
    return shapes


class FilledPool:
    """Contexts of requests, of random tokens.

    Tokens of blocks are random too, rather than masked, and visit as many experts as tokens of a text do.

    Attributes:
        token_ids: int64 [num_reqs, num_tokens] on the host, contexts and what may follow them.
    """

    def __init__(self, towers: TwoTowers, num_reqs: int, num_context_tokens: int, most_tokens: int) -> None:
        """Reads the contexts.

        Args:
            towers: both.
            num_reqs: requests that there are.
            num_context_tokens: of each request.
            most_tokens: of a pass, per request.
        """
        self.towers, self.num_context_tokens = towers, num_context_tokens
        num_tokens = num_context_tokens + most_tokens
        pages = num_reqs * -(-num_tokens // DEFAULT_PAGE_SIZE)
        self.state = ContextState.for_towers(towers, num_reqs, pages, scratch=True)
        generator = torch.Generator().manual_seed(0)
        self.token_ids = torch.randint(0, towers.config.vocab_size, (num_reqs, num_tokens), generator=generator)
        for request, tokens in enumerate(self.token_ids.tolist()):
            self.state.claim(request, num_tokens)
            self.state.extend_in_chunks(towers.context, {request: tokens[:num_context_tokens]}, want_logits=False)

    def tower_pass(self, shape: PassShape) -> TowerPass:
        """Makes a pass of the first requests."""
        config, dtype = self.towers.config, self.towers.dtype
        per_request = self.num_context_tokens * config.kv_bytes_per_token(dtype)
        per_request += config.mamba_bytes_per_request(dtype)
        is_step = shape.kind == "step"
        tower: Backbone = self.towers.denoiser if is_step else self.towers.context
        call = self._step(shape) if is_step else self._extension(shape)
        return TowerPass(shape, tower, call, shape.num_reqs * per_request)

    def _windows(self, shape: PassShape) -> ContextWindows:
        windows = ContextWindows(self.state, shape.num_tokens)
        windows.take_over(range(shape.num_reqs))
        return windows

    def _block(self, shape: PassShape) -> Tensor:
        """Tokens behind the contexts, int64 [num_reqs, num_tokens]."""
        stop = self.num_context_tokens + shape.num_tokens
        return self.token_ids[: shape.num_reqs, self.num_context_tokens : stop].to(self.towers.context.device)

    def _step(self, shape: PassShape) -> Callable[[], object]:
        denoiser = self.towers.denoiser
        windows, requests = self._windows(shape), range(shape.num_reqs)
        context = windows.view(windows.rows(requests, requests), shape.num_tokens)
        block = self._block(shape)
        with torch.inference_mode():
            modulation = denoiser.time_conditioning.for_block_size(shape.num_tokens)[-1:]
        return lambda: denoiser(block, context, modulation, wide_logits=False)

    def _extension(self, shape: PassShape) -> Callable[[], object]:
        windows, requests = self._windows(shape), range(shape.num_reqs)
        rows, device = windows.rows(requests, requests), windows.device
        stop = self.num_context_tokens + shape.num_tokens
        lengths = torch.full((shape.num_reqs,), stop, dtype=torch.int32, device=device)
        table = TokenTable(self.token_ids[: shape.num_reqs, :stop].int().to(device), lengths)

        def extend() -> object:
            windows.lengths.fill_(self.num_context_tokens)
            return windows.extend(self.towers.context, rows, table)

        return extend
