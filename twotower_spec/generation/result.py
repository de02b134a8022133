"""Results of generation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from twotower_spec.generation.phase_times import PhaseTimes


@dataclass(frozen=True)
class BlockTrace:
    """The steps in which one block of one row was filled.

    Attributes:
        xt: the block before the first step and after every step.
        t: masked fraction fed to each step.
        commits: positions committed by each step.
    """

    xt: list[list[int]]
    t: list[float]
    commits: list[int]


@dataclass(frozen=True)
class CommittedBlock:
    """Tokens that one row has gained for good.

    Attributes:
        row: index of the prompt.
        block_index: counts from 0 per row.
        token_ids: one token (AR, mock-AR) or a block, cut at `max_new_tokens`.
        num_denoiser_passes: denoiser passes this row took for the block.
        finished: the row ends with this block.
        trace: steps of the block, if asked for.
    """

    row: int
    block_index: int
    token_ids: list[int]
    num_denoiser_passes: int
    finished: bool
    trace: BlockTrace | None = None


@dataclass(frozen=True)
class GenerationResult:
    """Everything one call generated.

    Attributes:
        prompts: token ids per row, as given.
        token_ids: new token ids per row. Generation ends at an end-of-sequence token, which is kept; a diffusion block
            that contains one is kept whole, also what follows it.
        num_denoiser_passes: denoiser passes per row (NFE); 0 for AR.
        num_context_passes: context passes per row whose state or logits were used, the prompt counted as one.
        times: seconds per phase, of the whole batch.
        traces: per row, one `BlockTrace` per block; None unless asked for.
    """

    prompts: list[list[int]]
    token_ids: list[list[int]]
    num_denoiser_passes: list[int]
    num_context_passes: list[int]
    times: PhaseTimes = field(default_factory=PhaseTimes)
    traces: list[list[BlockTrace]] | None = None

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and new tokens per row, as the published functions return them."""
        return [[*prompt, *new] for prompt, new in zip(self.prompts, self.token_ids, strict=True)]

    @property
    def num_new_tokens(self) -> int:
        """New tokens of all rows together."""
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_denoiser_pass(self) -> float | None:
        """New tokens per denoiser pass (tokens per NFE), rows counted separately; None without denoiser passes."""
        passes = sum(self.num_denoiser_passes)
        return self.num_new_tokens / passes if passes else None

    @property
    def tokens_per_context_pass(self) -> float | None:
        """New tokens per context pass, rows counted separately; None without any."""
        passes = sum(self.num_context_passes)
        return self.num_new_tokens / passes if passes else None

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all rows per second of all phases."""
        return self.num_new_tokens / self.times.total_s if self.times.total_s else 0.0

    def to_tensor(self, pad_token_id: int = 0) -> Tensor:
        """`sequences` as int64 [num_reqs, longest], padded on the right."""
        rows = [torch.tensor(row) for row in self.sequences]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
