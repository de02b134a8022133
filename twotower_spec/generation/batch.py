"""State that all modes share: the checked prompts, the rows still running, and their context."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from twotower_spec.config import TwoTowerConfig
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import DenoiserPasses, HostLoop, TokenPicker
from twotower_spec.generation.options import EosTokenIds, GenerationOptions, Seeds
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.result import BlockTrace, CommittedBlock, GenerationResult
from twotower_spec.state import BlockContext, ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE, DEFAULT_TOKEN_BUDGET
from twotower_spec.state.transfer import to_device
from twotower_spec.towers.model import TwoTowers

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


class Batch:
    """Rows of one call. Rows that are finished leave it and give back their state.

    Attributes:
        prompts: token ids per row.
        active: indices of the rows that still run.
        generated: new token ids per row.
        times: seconds per phase.
    """

    def __init__(
        self,
        towers: TwoTowers,
        prompts: Prompts,
        options: GenerationOptions,
        num_read: int,
    ) -> None:
        """Checks what depends on the model and allocates the context state.

        Args:
            towers: the model.
            prompts: token ids.
            options: how text is generated.
            num_read: new tokens per row that the context tower reads at most.

        Raises:
            ArgumentError: a prompt is refused, or an option does not fit the model or the number of prompts.
        """
        self.towers, self.config = towers, towers.config
        self.prompts = parse_prompts(prompts, self.config.vocab_size)
        self.max_new_tokens = options.max_new_tokens
        self.mask_token_id = parse_mask_token(options.mask_token_id, self.config)
        self.eos_token_ids = parse_eos(options.eos_token_id, self.config.vocab_size)
        self.seeds = torch.tensor(parse_seeds(options.seed, len(self.prompts)))
        self.active = list(range(len(self.prompts))) if options.max_new_tokens else []
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.num_blocks = [0] * len(self.prompts)
        self.num_context_passes = [0] * len(self.prompts)
        self.times = PhaseTimes()
        lengths = [len(prompt) + num_read for prompt in self.prompts]
        pages = -(-max(lengths) // DEFAULT_PAGE_SIZE)
        # Rows get equally many consecutive pages: reading them back is then a view of the cache.
        self.state = ContextState.for_towers(towers, len(self.prompts), pages * len(self.prompts))
        for row in range(len(self.prompts)):
            self.state.claim(row, num_tokens=max(lengths))

    def prefill(self) -> Tensor | None:
        """Context tower over the prompts; logits [num_active, vocab] of their last tokens, None without active rows."""
        last = self._prefill({row: self.prompts[row] for row in self.active}, want_logits=True)
        return torch.stack([last[row] for row in self.active]) if self.active else None

    def prefill_without_logits(self, leave_out_last: bool = False) -> None:
        """Context tower over the prompts, or over all but their last tokens."""
        stop = -1 if leave_out_last else None
        self._prefill({row: self.prompts[row][:stop] for row in self.active}, want_logits=False)

    def _prefill(self, rows: dict[int, list[int]], want_logits: bool) -> dict[int, Tensor]:
        with self.times.measure("prefill", self.towers.context.device):
            return self.state.extend_in_chunks(self.towers.context, rows, DEFAULT_TOKEN_BUDGET, want_logits)

    def extend(self, tokens: dict[int, list[int]], want_logits: bool) -> Tensor | None:
        """Context tower over committed tokens of the given rows; logits [num_rows, vocab] of their last token."""
        if not tokens:
            return None
        with self.times.measure("extend", self.towers.context.device):
            return self.state.extend(self.towers.context, tokens, logits="last" if want_logits else "none").logits

    def block_context(self, block_size: int) -> BlockContext:
        """Context state of the active rows, for the denoiser."""
        return self.state.block_context(self.active, block_size)

    def denoising_loop(self, options: GenerationOptions) -> HostLoop:
        """Makes the loop that fills blocks of this size, for any of the rows."""
        assert options.block_size is not None
        denoiser = self.towers.denoiser
        with self.times.measure("denoise", denoiser.device):
            passes = DenoiserPasses(denoiser, options.block_size)
            return HostLoop(passes, TokenPicker(options.sampler, self.mask_token_id))

    def active_seeds(self, device: torch.device) -> Tensor:
        """Seeds int64 [num_active]."""
        return self.seeds[self.active].to(device)

    def next_positions(self, device: torch.device) -> Tensor:
        """Index of the next token in the sequence of every active row, int64 [num_active]."""
        return to_device([len(self.prompts[r]) + len(self.generated[r]) for r in self.active], device)

    def num_left(self, row: int) -> int:
        """Tokens that a row may still gain."""
        return self.max_new_tokens - len(self.generated[row])

    def commit(self, row: int, tokens: list[int], num_denoiser_passes: int) -> CommittedBlock:
        """Adds tokens to a row, cut at `max_new_tokens`, and says whether the row ends with them."""
        tokens = tokens[: self.num_left(row)]
        self.generated[row].extend(tokens)
        finished = not self.num_left(row) or not self.eos_token_ids.isdisjoint(tokens)
        block = CommittedBlock(row, self.num_blocks[row], tokens, num_denoiser_passes, finished)
        self.num_context_passes[row] += 1
        self.num_blocks[row] += 1
        if finished:
            self.active.remove(row)
            self.state.release(row)
        return block

    def up_to_end(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first one that ends a row."""
        ends = [i for i, token in enumerate(tokens) if token in self.eos_token_ids]
        return tokens[: ends[0] + 1] if ends else tokens

    def collect(self, blocks: Iterable[CommittedBlock], with_traces: bool = False) -> GenerationResult:
        """Runs the loop to its end."""
        passes = [0] * len(self.prompts)
        traces: list[list[BlockTrace]] = [[] for _ in self.prompts]
        for block in blocks:
            passes[block.row] += block.num_denoiser_passes
            if block.trace is not None:
                traces[block.row].append(block.trace)
        return GenerationResult(
            prompts=self.prompts,
            token_ids=self.generated,
            num_denoiser_passes=passes,
            num_context_passes=self.num_context_passes,
            times=self.times,
            traces=traces if with_traces else None,
        )


def parse_prompts(input_ids: Prompts, vocab_size: int) -> list[list[int]]:
    """Prompts as lists: from a tensor [num_reqs, num_tokens] or [num_tokens], one list of ids, or a list per row.

    Raises:
        ArgumentError: no prompt, an empty prompt, or an id outside the vocabulary.
    """
    rows: list[Any] = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if rows and isinstance(rows[0], int):
        rows = [rows]
    prompts: list[list[int]] = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
    if not prompts:
        raise ArgumentError("no prompt was given; give at least one")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ArgumentError(f"prompt {i} is empty; give at least one token, the tokenizer's bos token for instance")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ArgumentError(
                    f"token id {token!r} in prompt {i} is outside the vocabulary; allowed are 0 to {vocab_size - 1}"
                )
    return prompts


def parse_mask_token(mask_token_id: int | None, config: TwoTowerConfig) -> int:
    """The id given, or the model's.

    Raises:
        ArgumentError: it is outside the vocabulary.
    """
    token = config.mask_token_id if mask_token_id is None else mask_token_id
    if token >= config.vocab_size:
        raise ArgumentError(
            f"mask_token_id {token} is outside the vocabulary; allowed are 0 to {config.vocab_size - 1}"
        )
    return token


def parse_eos(eos_token_id: EosTokenIds, vocab_size: int) -> frozenset[int]:
    """The ids that end a row.

    Raises:
        ArgumentError: an id is outside the vocabulary.
    """
    ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ArgumentError(f"eos_token_id {token!r} is outside the vocabulary; allowed are 0 to {vocab_size - 1}")
    return frozenset(ids)


def parse_seeds(seed: Seeds, num_reqs: int) -> list[int]:
    """One seed per row.

    Raises:
        ArgumentError: not an integer, or not one per row.
    """
    if seed is None:
        seed = secrets.randbits(62)
    seeds = [seed + row for row in range(num_reqs)] if isinstance(seed, int) else list(seed)
    if len(seeds) != num_reqs:
        raise ArgumentError(f"{len(seeds)} seeds were given for {num_reqs} prompts; give one integer or one per prompt")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
            raise ArgumentError(f"seed {value!r} is not allowed; give a 64-bit integer")
    return seeds
