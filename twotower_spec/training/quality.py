"""Acceptance length of drafts on a verifier's own text, for the towers and their rivals.

The verifier's text is fixed first. A drafter then walks over it as in speculative decoding: at every verify step the
drafts that agree with the text from the left are accepted, and the next token comes from the verifier. For greedy
text this is what decoding does; for text sampled at a temperature it is decoding with coupled noise, whose expected
acceptance equals that of the exact one-hot rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from twotower_spec.drafting import DraftingSession, DraftPolicy, DraftRequest
from twotower_spec.drafting.block_drafter import FirstToken
from twotower_spec.drafting.verifier import Verifier
from twotower_spec.generation.sampling import Sampler
from twotower_spec.generation.self_speculative import agreeing
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE
from twotower_spec.towers.model import TwoTowers
from twotower_spec.training.sampling import continue_prompts

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel

NGRAM_LENGTHS = (3, 2)


@dataclass(frozen=True)
class VerifierText:
    """A prompt and what the verifier wrote after it, in token ids."""

    prompt: list[int]
    text: list[int]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and continuation together."""
        return self.prompt + self.text


class Drafter(Protocol):
    """Proposes tokens after each of several rows; a new object for every walk."""

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """At most `num_tokens` drafts per row.

        Args:
            rows: all tokens so far, by row number; a row only ever grows.
            num_tokens: drafts wanted per row.
        """
        ...


@dataclass(frozen=True)
class Acceptance:
    """Result of a drafter's walk over texts.

    Attributes:
        tokens, verify_steps: per text; the first token of a text comes from the verifier's prefill and is not counted.
        by_position: share of the verify steps in which the draft at each position was accepted.
        num_denoiser_passes: of all verify steps, 0 for other drafters.
    """

    tokens: list[int]
    verify_steps: list[int]
    by_position: list[float]
    num_denoiser_passes: int

    @property
    def length(self) -> float:
        """Acceptance length: tokens per verify step, the verifier's own included; 1 where no text needed a step."""
        return sum(self.tokens) / sum(self.verify_steps) if self.verify_steps else 1.0

    def interval(self) -> tuple[float, float]:
        """Bootstrap interval of the acceptance length at 95 %, over texts; its ends are `length` for a single text."""
        from twotower_spec.evaluation.statistics import bootstrap_interval  # a package that stands above this one

        if not self.tokens:
            return self.length, self.length
        interval = bootstrap_interval(self.tokens, self.verify_steps)
        return interval.low, interval.high


def write_texts(
    verifier: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    batch_size: int = 32,
) -> list[VerifierText]:
    """Lets the verifier continue prompts, greedily at temperature 0; prompt i has seed i."""
    sampler = Sampler(temperature)
    texts: list[VerifierText] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        seeds = range(start, start + len(rows))
        new = continue_prompts(verifier, rows, max_new_tokens, sampler, eos_token_ids, seeds)
        texts.extend(VerifierText(list(row), text) for row, text in zip(rows, new, strict=True))
    return texts


def measure_acceptance(drafter: Drafter, texts: Sequence[VerifierText], num_tokens: int) -> Acceptance:
    """Walks over all texts at once with `num_tokens` drafts per verify step."""
    position = {row: len(text.prompt) + 1 for row, text in enumerate(texts) if len(text.text) > 1}
    tokens, steps = [0] * len(texts), [0] * len(texts)
    accepted_at, num_drafts = np.zeros(num_tokens), 0
    while position:
        drafts = drafter.draft({row: texts[row].token_ids[:end] for row, end in position.items()}, num_tokens)
        for row, end in list(position.items()):
            left = texts[row].token_ids[end:]
            accepted = agreeing(drafts[row], left)
            accepted_at[:accepted] += 1
            gained = min(accepted + 1, len(left))
            tokens[row] += gained
            steps[row] += 1
            num_drafts += 1
            position[row] = end + gained
            if gained == len(left):
                del position[row]
    passes = drafter.num_denoiser_passes if isinstance(drafter, TowerDrafter) else 0
    kept = [i for i, count in enumerate(steps) if count]
    return Acceptance(
        [tokens[i] for i in kept], [steps[i] for i in kept], (accepted_at / max(num_drafts, 1)).tolist(), passes
    )


def repeated_4gram_fraction(texts: Sequence[VerifierText]) -> float:
    """Share of the 4-grams of a continuation that occurred in it before, over all texts."""
    repeated = total = 0
    for text in texts:
        grams = [tuple(text.text[i : i + 4]) for i in range(len(text.text) - 3)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0


class TowerDrafter:
    """Drafts blocks with both towers.

    Args:
        towers: the model.
        num_rows, longest: rows of the walk and tokens of the longest.
        policy: how a block is denoised.
        first_token: the tower that makes the first draft.
    """

    def __init__(
        self, towers: TwoTowers, num_rows: int, longest: int, policy: DraftPolicy, first_token: FirstToken
    ) -> None:
        pages = -(-longest // DEFAULT_PAGE_SIZE) * num_rows
        self._session = DraftingSession(
            towers,
            policy,
            first_token=first_token,
            num_slots=num_rows,
            num_tokens=pages * DEFAULT_PAGE_SIZE,
            token_budget=max(1, num_rows * longest),
        )
        self.num_denoiser_passes = 0

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """See `Drafter.draft`."""
        block = self._session.draft([DraftRequest(row, token_ids) for row, token_ids in rows.items()]).block
        self.num_denoiser_passes += sum(block.num_denoiser_passes)
        return {row: drafts[:num_tokens] for row, drafts in zip(rows, block.rows(), strict=True)}


class ContextTowerDrafter:
    """Drafts with the context tower alone, one token after the other.

    Args:
        towers: the model.
        num_rows, longest: rows of the walk and tokens of the longest.
    """

    def __init__(self, towers: TwoTowers, num_rows: int, longest: int) -> None:
        self._tower = towers.context
        pages = -(-longest // DEFAULT_PAGE_SIZE) * num_rows
        self._state = ContextState(towers.config, num_rows, pages, towers.dtype, towers.context.device)

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """See `Drafter.draft`."""
        state, tower = self._state, self._tower
        new = {row: tokens[state.num_computed_tokens(row) :] for row, tokens in rows.items()}
        last = state.extend_in_chunks(tower, new)
        drafts = {row: [int(last[row].argmax())] for row in rows}
        accepted = state.snapshot(list(rows))
        for _ in range(num_tokens - 1):
            logits = state.extend(tower, {row: tokens[-1:] for row, tokens in drafts.items()}).logits
            assert logits is not None
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                drafts[row].append(token)
        state.roll_back(accepted)
        return drafts


class ModelDrafter:
    """Drafts with an autoregressive draft model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._reader: Verifier | None = None
        self._lengths: dict[int, int] = {}

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """See `Drafter.draft`."""
        if self._reader is None:
            self._reader = Verifier(self._model, list(rows.values()))
            self._lengths = {row: len(tokens) - 1 for row, tokens in rows.items()}
        reader = self._reader
        if len(rows) < len(self._lengths):
            reader.select([i for i, row in enumerate(self._lengths) if row in rows])
            self._lengths = {row: length for row, length in self._lengths.items() if row in rows}
        new = [rows[row][length:] for row, length in self._lengths.items()]
        logits = reader.read(new)
        reader.keep([len(tokens) for tokens in new], new)
        drafts = [[int(logits[i, len(tokens) - 1].argmax())] for i, tokens in enumerate(new)]
        for _ in range(num_tokens - 1):
            newest = [tokens[-1:] for tokens in drafts]
            following = reader.read(newest)[:, 0].argmax(-1).tolist()
            reader.keep([1] * len(newest), newest)
            for tokens, token in zip(drafts, following, strict=True):
                tokens.append(token)
        reader.forget(num_tokens - 1)
        self._lengths = {row: len(rows[row]) for row in self._lengths}
        return dict(zip(self._lengths, drafts, strict=True))


class NgramDrafter:
    """Drafts what followed the last occurrence of the newest three tokens, or else of the newest two."""

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """See `Drafter.draft`."""
        return {row: self._lookup(tokens, num_tokens) for row, tokens in rows.items()}

    @staticmethod
    def _lookup(tokens: list[int], num_tokens: int) -> list[int]:
        for length in NGRAM_LENGTHS:
            newest = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == newest:
                    return tokens[start + length : start + length + num_tokens]
        return []
