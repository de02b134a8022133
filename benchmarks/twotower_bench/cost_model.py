"""Tokens per second with TwoTower drafting beside none, predicted from step times and acceptance lengths.

The notions are those of `AdaptivePolicy`, which decides the same while it serves: a round is worth the tokens that it
gains, a draft is worth its share of the verification, and drafting nothing is one of the choices.

    speed-up = L t(1) / (t(1 + K) + extend + passes * denoise + host)

with t(n) for a step of the engine in which the verifier reads n tokens per request, and L for the acceptance length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import (
    AcceptanceLength,
    DraftingPhases,
    Estimate,
    MeasuredCell,
    VerifierStep,
    check_positive,
)
from twotower_bench.uncertainty import Doubt, Draws, Grid, summary
from twotower_spec.config import ATTENTION, MAMBA, MLP, MOE, TwoTowerConfig, check_integer
from twotower_spec.errors import ArgumentError

# The released model's shape.
PUBLISHED_SIZE = TwoTowerConfig(
    hidden_size=2688,
    num_hidden_layers=52,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    vocab_size=131072,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    n_groups=8,
    ssm_state_size=128,
    conv_kernel=4,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
    intermediate_size=1856,
    torch_dtype="bfloat16",
)


def weight_bytes_of_pass(config: TwoTowerConfig, num_tokens: float, with_head: bool, itemsize: int) -> float:
    """Bytes of weights that one pass over `num_tokens` tokens reads, with evenly used experts.

    The union of experts that n tokens visit is E (1 - (1 - k / E)^n).
    """
    hidden, experts = config.hidden_size, config.n_routed_experts
    mamba = hidden * (config.d_inner + config.d_conv_channels + config.mamba_num_heads) + config.d_inner * hidden
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = 2 * hidden * (q_width + kv_width)
    visited = experts * (1 - (1 - config.num_experts_per_tok / max(experts, 1)) ** num_tokens)
    moe = 2 * hidden * (visited * config.moe_intermediate_size + config.moe_shared_expert_intermediate_size)
    mlp = 2 * hidden * config.intermediate_size
    count = config.layer_kinds.count
    layers = count(MAMBA) * mamba + count(ATTENTION) * attention + count(MOE) * moe + count(MLP) * mlp
    head = config.vocab_size * hidden if with_head else 0
    num_bytes: float = itemsize * (layers + head)
    return num_bytes


@dataclass(frozen=True)
class DraftingTime:
    """Milliseconds of drafting in one round, for the whole batch."""

    extend: Draws
    denoise: Draws
    host: Draws


class DraftingCost(Protocol):
    """What a round of drafting takes."""

    def round(self, batch_size: float, block_size: int, passes: float, acceptance_length: float) -> DraftingTime:
        """Times of one round.

        Raises:
            ArgumentError: they are not known there.
        """
        ...


class MeasuredDrafting:
    """Phases that were measured, by batch size and block size."""

    def __init__(self, phases: Iterable[DraftingPhases], doubt: Doubt) -> None:
        """Draws them once, so that all predictions of a model share their doubt."""
        phases = tuple(phases)

        def grid(what: str, times: list[Draws]) -> Grid:
            places = [(phase.batch_size, phase.block_size) for phase in phases]
            return Grid(what, "block size", dict(zip(places, times, strict=True)))

        self._extend = grid("the context pass", [doubt.draws(phase.extend_ms) for phase in phases])
        self._denoise = grid("the denoiser pass", [doubt.draws(phase.denoise_ms) for phase in phases])
        self._host = grid("the drafter's host work", [np.full(1 + doubt.num_draws, p.host_ms) for p in phases])

    def round(self, batch_size: float, block_size: int, passes: float, acceptance_length: float) -> DraftingTime:
        """See `DraftingCost.round`; the context pass is the one that was measured, whatever is accepted."""
        place = (batch_size, block_size)
        return DraftingTime(self._extend.at(*place), passes * self._denoise.at(*place), self._host.at(*place))


@dataclass(frozen=True)
class DrafterSize:
    """A drafter that was not measured: its weights over a bandwidth.

    Caches, states and arithmetic are left out, which makes it a lower bound of the time: right while passes wait for
    memory, and far too low where a large batch or a CPU computes all the time.

    Attributes:
        config: shape of both towers.
        bandwidth_gb_s: gigabytes (1e9) that the device reads per second.
        itemsize: bytes per weight.
        launch_overhead_ms: added to every pass.
        times_floor: how many times the time of its bytes a pass takes; 1 is the bound itself.

    Raises:
        ArgumentError: a number is out of range.
    """

    config: TwoTowerConfig
    bandwidth_gb_s: float
    itemsize: int = 2
    launch_overhead_ms: float = 0.0
    times_floor: float = 1.0

    def __post_init__(self) -> None:
        check_positive("bandwidth_gb_s", self.bandwidth_gb_s)
        check_integer("itemsize", self.itemsize, minimum=1)
        if not 0 <= self.launch_overhead_ms < np.inf:
            raise ArgumentError(f"launch_overhead_ms {self.launch_overhead_ms} is not allowed; give 0 or more")
        if not 1 <= self.times_floor < np.inf:
            raise ArgumentError(f"times_floor {self.times_floor} is not allowed; give 1 or more")

    def pass_ms(self, num_tokens: float) -> float:
        """One pass of either tower, with its head, over so many tokens of all requests together."""
        num_bytes = weight_bytes_of_pass(self.config, num_tokens, with_head=True, itemsize=self.itemsize)
        return self.times_floor * num_bytes / self.bandwidth_gb_s / 1e6 + self.launch_overhead_ms


class DerivedDrafting:
    """Phases that follow from the drafter's size."""

    def __init__(self, size: DrafterSize, doubt: Doubt) -> None:
        """Draws one factor for all of them: what is wrong with the bound is wrong with every pass."""
        self.size = size
        self._factor = doubt.draws(Estimate(1.0))

    def round(self, batch_size: float, block_size: int, passes: float, acceptance_length: float) -> DraftingTime:
        """See `DraftingCost.round`."""
        extend = self.size.pass_ms(batch_size * acceptance_length)
        denoise = passes * self.size.pass_ms(batch_size * block_size)
        return DraftingTime(extend * self._factor, denoise * self._factor, np.zeros_like(self._factor))


@dataclass(frozen=True)
class Prediction:
    """One way to draft, for one load.

    Attributes:
        category, temperature: of the text.
        batch_size: requests at once.
        setting: how blocks are drafted.
        acceptance_length: tokens per round and request.
        plain_ms, verify_ms: a step without drafts, and one that verifies them.
        extend_ms, denoise_ms, host_ms: drafting, per round.
        tokens_per_s, plain_tokens_per_s: of the whole batch, with drafting and without.
        speed_up: their ratio.
        break_even_length: acceptance length at which it is 1.
        probability_faster: share of draws in which it is above 1.
    """

    category: str
    temperature: float
    batch_size: int
    setting: DraftSetting
    acceptance_length: Estimate
    plain_ms: float
    verify_ms: float
    extend_ms: float
    denoise_ms: float
    host_ms: float
    tokens_per_s: Estimate
    plain_tokens_per_s: Estimate
    speed_up: Estimate
    break_even_length: float
    probability_faster: float

    @property
    def drafting_ms(self) -> float:
        """All three phases."""
        return self.extend_ms + self.denoise_ms + self.host_ms

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        estimates = {name: value.to_json() for name, value in vars(self).items() if isinstance(value, Estimate)}
        return {**asdict(self), **estimates}


@dataclass(frozen=True)
class _Round:
    """Draws of one round: tokens gained per request, milliseconds of the whole batch."""

    num_tokens: int
    length: Draws
    verify: Draws
    drafting: DraftingTime

    @property
    def total(self) -> Draws:
        """Milliseconds of all of it."""
        return self.verify + self.drafting.extend + self.drafting.denoise + self.drafting.host


class CostModel:
    """Predicts from step times of the verifier and of the drafter.

    Doubt is carried through by Monte Carlo: all numbers are drawn together, from a private generator, and every
    prediction uses the same draws, so that settings are compared with each other and not with luck.

    Args:
        verifier_steps: by batch size and tokens per request; straight lines in between, nothing beyond.
        drafting: phases that were measured, or the drafter's size.
        doubt: of numbers; the default takes those without an interval to be within 10 %.
    """

    def __init__(
        self,
        verifier_steps: Iterable[VerifierStep],
        drafting: Iterable[DraftingPhases] | DrafterSize,
        doubt: Doubt | None = None,
    ) -> None:
        self.doubt = doubt or Doubt()
        self._steps = tuple(verifier_steps)
        self._phases = drafting if isinstance(drafting, DrafterSize) else tuple(drafting)
        times = {(step.batch_size, step.num_tokens): self.doubt.draws(step.ms) for step in self._steps}
        self.verifier = Grid("a verifier step", "tokens per request", times)
        self.drafting: DraftingCost
        if isinstance(self._phases, DrafterSize):
            self.drafting = DerivedDrafting(self._phases, self.doubt)
        else:
            self.drafting = MeasuredDrafting(self._phases, self.doubt)
        self._lengths: dict[AcceptanceLength, Draws] = {}

    def without(self, batch_size: int) -> CostModel:
        """The same without the times of a batch size: there it has straight lines between the next smaller and larger.

        Args:
            batch_size: to hold out.
        """
        phases = self._phases
        if not isinstance(phases, DrafterSize):
            phases = tuple(one for one in phases if one.batch_size != batch_size)
        steps = tuple(step for step in self._steps if step.batch_size != batch_size)
        return CostModel(steps, phases, self.doubt)

    def predict(
        self, batch_size: int, acceptance: AcceptanceLength, num_speculative_tokens: int | None = None
    ) -> Prediction:
        """Speed-up of one way to draft.

        Args:
            batch_size: requests at once.
            acceptance: what drafts of this kind gain.
            num_speculative_tokens: drafts of each block that are verified; None for all that were measured.

        Raises:
            ArgumentError: it is outside what was given.
        """
        round_ = self._round(batch_size, acceptance, num_speculative_tokens)
        plain = self.verifier.at(batch_size, 1)
        speed_up = round_.length * plain / round_.total
        return Prediction(
            category=acceptance.category,
            temperature=acceptance.temperature,
            batch_size=batch_size,
            setting=replace(acceptance.setting, num_speculative_tokens=round_.num_tokens),
            acceptance_length=summary(round_.length),
            plain_ms=float(plain[0]),
            verify_ms=float(round_.verify[0]),
            extend_ms=float(round_.drafting.extend[0]),
            denoise_ms=float(round_.drafting.denoise[0]),
            host_ms=float(round_.drafting.host[0]),
            tokens_per_s=summary(1e3 * batch_size * round_.length / round_.total),
            plain_tokens_per_s=summary(1e3 * batch_size / plain),
            speed_up=summary(speed_up),
            break_even_length=float(round_.total[0] / plain[0]),
            probability_faster=float((speed_up[1:] > 1).mean()),
        )

    def _round(self, batch_size: float, acceptance: AcceptanceLength, num_speculative_tokens: int | None) -> _Round:
        setting = acceptance.setting
        most = setting.num_speculative_tokens
        num_tokens = most if num_speculative_tokens is None else num_speculative_tokens
        length = self._length(acceptance, num_tokens)
        # Where the policy chose, a lower limit shortens those drafts alone that were longer.
        drafted = num_tokens if acceptance.num_draft_tokens is None else min(acceptance.num_draft_tokens, num_tokens)
        passes = setting.steps_per_block if acceptance.denoiser_passes is None else acceptance.denoiser_passes
        return _Round(
            num_tokens=num_tokens,
            length=length,
            verify=self.verifier.at(batch_size, 1 + drafted),
            drafting=self.drafting.round(batch_size, setting.block_size, passes, float(length[0])),
        )

    def _length(self, acceptance: AcceptanceLength, num_tokens: int) -> Draws:
        most = acceptance.setting.num_speculative_tokens
        if acceptance not in self._lengths:
            self._lengths[acceptance] = self.doubt.draws(acceptance.length, low=1.0, high=1.0 + most)
        whole = self._lengths[acceptance]
        shorter = acceptance.of_first(num_tokens)
        if num_tokens == most or acceptance.length.value == 1:
            return np.minimum(whole, 1.0 + num_tokens)
        # What is wrong with the accepted drafts of whole blocks is as wrong with the first of them.
        return np.clip(1 + (whole - 1) * (shorter - 1) / (acceptance.length.value - 1), 1.0, 1.0 + num_tokens)

    def predict_cell(self, cell: MeasuredCell, acceptance: AcceptanceLength | None) -> Estimate:
        """Tokens per second of a measured cell; `acceptance` is that of its setting, None without drafting.

        Where whole requests were timed, the steps that read prompts are counted with the time to the first token, in
        which the other requests of the batch go on by a round, and so is the unused end of the last round, half a round
        where it is not known. Where the batch was not full all the time, as when the last requests of a run end one
        after the other, times are those of its mean size: exact as far as they grow by the same with every request.

        Raises:
            ArgumentError: it is outside what was given.
        """
        batch_size = cell.batch_size if cell.mean_batch_size is None else cell.mean_batch_size
        if acceptance is None:
            round_ms = self.verifier.at(batch_size, 1)
            length = np.ones_like(round_ms)
        else:
            round_ = self._round(batch_size, acceptance, None)
            length, round_ms = round_.length, round_.total
        if cell.new_tokens is None:
            return summary(1e3 * batch_size * length / round_ms)
        unused = (length - 1) / 2 if cell.unused_tokens is None else cell.unused_tokens
        decoded = np.maximum(cell.new_tokens - 1 + unused, 0.0)  # the first token is the prompt step's
        steps = (1 + decoded / length) / batch_size  # per request, that it shares with the others
        prompt_steps = 1 / batch_size if cell.prompt_steps is None else cell.prompt_steps
        first_ms = self.verifier.at(batch_size, 1) if cell.first_token_ms is None else cell.first_token_ms
        ms = prompt_steps * first_ms + np.maximum(steps - prompt_steps, 0.0) * round_ms
        return summary(1e3 * cell.new_tokens / ms)
