"""Speculative decoding in plain PyTorch: draft, verify, accept. The specification that serving engines are held to."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from twotower_spec.config import check_integer
from twotower_spec.drafting.draft_block import DraftBlock
from twotower_spec.drafting.metrics import DraftingMetrics, DraftingSummary
from twotower_spec.drafting.round import DraftRequest, Round, RoundResult
from twotower_spec.drafting.session import DraftingSession
from twotower_spec.drafting.stopping import FinishReason, StopConditions
from twotower_spec.drafting.verification import VerificationOutcome, find_verification_rule
from twotower_spec.drafting.verifier import Verifier
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.batch import Prompts, parse_eos, parse_prompts, parse_seeds
from twotower_spec.generation.options import EosTokenIds, Seeds
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state.context_state import RequestId
from twotower_spec.state.transfer import to_device

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SpeculativeStep:
    """Tokens that one row gained in one round.

    Attributes:
        row: index of the prompt.
        token_ids: new tokens, in order.
        num_accepted: how many of them, from the left, are accepted drafts; the target chose the rest.
        finish_reason: "eos", "stop" or "length" with the last step of a row, else None.
    """

    row: int
    token_ids: list[int]
    num_accepted: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class SpeculativeResult:
    """Everything one call generated.

    Attributes:
        prompts: token ids per row, as given.
        token_ids: new token ids per row; an end token is kept, nothing follows it.
        accepted: per new token, whether it is an accepted draft.
        finish_reasons: per row.
        summary: figures of the drafting.
        total_s: wall-clock seconds, prefill included.
    """

    prompts: list[list[int]]
    token_ids: list[list[int]]
    accepted: list[list[bool]]
    finish_reasons: list[FinishReason | None]
    summary: DraftingSummary
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all rows per second."""
        return sum(map(len, self.token_ids)) / self.total_s if self.total_s else 0.0


def speculative_loop(
    verifier: PreTrainedModel,
    drafter: DraftingSession | None,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    sampler: Sampler | None = None,
    verification_rule: str | None = None,
    eos_token_id: EosTokenIds = None,
    *,
    stop_strings: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: Seeds = None,
) -> SpeculativeResult:
    """Writes the target's text, faster: drafts are verified several at a time.

    Args:
        verifier: the target, any causal language model of transformers.
        drafter: None to generate without drafts.
        input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
        max_new_tokens: most new tokens per row.
        sampler: temperature and filters of the target; None for greedy.
        verification_rule: its name; None for greedy at temperature 0 and one-hot above.
        eos_token_id: an id or several ids that end a row; None to run to `max_new_tokens`.
        stop_strings: text that ends a row, with the token that completes it.
        tokenizer: the target's, for stop strings.
        seed: of the noise; row i of a call uses `seed + i`, or give one per row. None for a random one.

    Raises:
        ArgumentError: an argument is not allowed, or the rule would not be exact for this drafter's drafts.
    """
    started = time.perf_counter()
    run = SpeculativeRun(
        verifier,
        drafter,
        input_ids,
        max_new_tokens,
        sampler,
        verification_rule,
        eos_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        seed=seed,
    )
    accepted: list[list[bool]] = [[] for _ in run.prompts]
    reasons: list[FinishReason | None] = [None] * len(run.prompts)
    for step in run:
        accepted[step.row].extend(i < step.num_accepted for i in range(len(step.token_ids)))
        reasons[step.row] = step.finish_reason
    total = time.perf_counter() - started
    return SpeculativeResult(run.prompts, run.token_ids, accepted, reasons, run.metrics.summary(), total)


class SpeculativeRun:
    """`speculative_loop` as an iterator over `SpeculativeStep`: every row's new tokens, round by round.

    Arguments and errors are those of `speculative_loop`.

    Attributes:
        prompts: token ids per row.
        token_ids: new token ids per row so far.
        metrics: figures so far.
    """

    def __init__(
        self,
        verifier: PreTrainedModel,
        drafter: DraftingSession | None,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        verification_rule: str | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        stop_strings: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: Seeds = None,
    ) -> None:
        vocab_size = verifier.config.get_text_config().vocab_size
        check_integer("max_new_tokens", max_new_tokens, minimum=0)
        if drafter is not None and drafter.num_token_ids > vocab_size:
            raise ArgumentError(
                f"the drafter may draft ids up to {drafter.num_token_ids - 1}, but the target has {vocab_size}; make "
                f"the drafter with num_token_ids={vocab_size}"
            )
        self.verifier, self.drafter = verifier, drafter
        self.sampler = sampler or Sampler()
        self.verification_rule = find_verification_rule(verification_rule, self.sampler)
        if drafter is not None:
            self.verification_rule.require_exact(drafter.provenance, self.sampler)
        self.prompts = parse_prompts(input_ids, vocab_size)
        self.stop = StopConditions(max_new_tokens, parse_eos(eos_token_id, vocab_size), stop_strings, tokenizer)
        self.seeds = parse_seeds(seed, len(self.prompts))
        self.token_ids: list[list[int]] = [[] for _ in self.prompts]
        self.metrics = DraftingMetrics()
        self._name = secrets.token_hex(8)
        self._steps = self._run()

    def __iter__(self) -> Iterator[SpeculativeStep]:
        """The steps still to come: a loop that was left goes on with the next one."""
        return self._steps

    def close(self) -> None:
        """Ends the run early and gives back its requests; a run that came to its end has done so."""
        self._steps.close()

    def _run(self) -> Generator[SpeculativeStep]:
        try:
            if self.stop.max_new_tokens:
                yield from self._rounds()
        finally:
            if self.drafter is not None:
                for row in range(len(self.prompts)):
                    self.drafter.release(self._request(row))

    def _request(self, row: int) -> RequestId:
        return self._name, row

    def _rounds(self) -> Generator[SpeculativeStep]:
        target = Verifier(self.verifier, self.prompts)
        active = list(range(len(self.prompts)))
        while active:
            # The first pass reads the prompts, and has nothing to verify.
            first = target.num_passes == 0
            drafted = None if first else self._draft(active)
            block = drafted.block if drafted else DraftBlock.empty(tuple(map(self._request, active)))
            drafts = block.rows()
            newest = [(self.token_ids[row] or self.prompts[row])[-1] for row in active]
            tokens = [[token, *row_drafts] for token, row_drafts in zip(newest, drafts, strict=True)]
            started = time.perf_counter()
            outcome = self._verify(target, active, tokens, block)
            verify_s = time.perf_counter() - started
            steps = []
            for row, row_drafts, accepted, following in zip(
                active, drafts, outcome.num_accepted, outcome.next_tokens, strict=True
            ):
                new, reason = self.stop.cut(self.token_ids[row], [*row_drafts[:accepted], following])
                self.token_ids[row].extend(new)
                steps.append(SpeculativeStep(row, new, min(accepted, len(new)), reason))
            if not first:
                self._count(drafted, block, outcome.num_accepted, steps, verify_s)
            target.keep([1 + accepted for accepted in outcome.num_accepted], tokens)
            going_on = [i for i, step in enumerate(steps) if step.finish_reason is None]
            for step in steps:
                if step.finish_reason and self.drafter is not None:
                    self.drafter.release(self._request(step.row))
            if len(going_on) < len(active) and going_on:
                target.select(going_on)
            active = [active[i] for i in going_on]
            yield from steps

    def _draft(self, active: list[int]) -> Round | None:
        if self.drafter is None:
            return None
        return self.drafter.draft(
            [
                DraftRequest(
                    self._request(row),
                    [*self.prompts[row], *self.token_ids[row]],
                    # The round brings a token of the target's in any case.
                    max_draft_tokens=self.stop.max_new_tokens - len(self.token_ids[row]) - 1,
                    seed=self.seeds[row],
                )
                for row in active
            ]
        )

    def _verify(
        self, target: Verifier, active: list[int], tokens: list[list[int]], block: DraftBlock
    ) -> VerificationOutcome:
        logits = target.read(tokens)[:, : block.token_ids.shape[1] + 1]
        positions = [len(self.prompts[row]) + len(self.token_ids[row]) for row in active]
        return self.verification_rule.verify(
            logits,
            block,
            self.sampler,
            to_device([self.seeds[row] for row in active], logits.device),
            to_device(positions, logits.device),
        )

    def _count(
        self,
        drafted: Round | None,
        block: DraftBlock,
        num_accepted: list[int],
        steps: list[SpeculativeStep],
        verify_s: float,
    ) -> None:
        self.metrics.verify_s += verify_s
        if self.drafter is not None and drafted is not None:
            self.drafter.observe(drafted, RoundResult(num_accepted, verify_s))
            self.metrics.verify_s -= drafted.late_s
            self.metrics.extend_s += drafted.times.extend_s
            self.metrics.denoise_s += drafted.times.denoise_s
        for i, step in enumerate(steps):
            self.metrics.add_round(
                num_draft_tokens=block.num_draft_tokens[i],
                num_accepted=num_accepted[i],
                num_tokens=len(step.token_ids),
                confidence=block.confidence[i].tolist(),
                num_denoiser_passes=block.num_denoiser_passes[i],
                num_context_passes=block.num_context_passes[i],
            )
