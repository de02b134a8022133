"""The drafter of one engine, whatever model runner asks it: a session, its policy, what is counted, and faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from twotower_kernels.acceptance import warm_up
from twotower_spec.drafting import DraftingRounds, DraftingSession, DraftPolicy, DraftRequest, Round, RoundResult
from twotower_spec.errors import ArgumentError, TwoTowerError
from twotower_spec.generation import PhaseTimes
from vllm_twotower.config import DrafterKnobs
from vllm_twotower.faults import FaultHandler
from vllm_twotower.loading import load_session
from vllm_twotower.metrics import RESOURCES, DrafterStats, log_line
from vllm_twotower.requirements import configuration_of
from vllm_twotower.stats_folder import end_with_server, stats_path

logger = init_logger("vllm.twotower.drafter")

# How much the acceptance length remembers: about a hundred drafts.
ACCEPTANCE_MEMORY = 0.99


Result = TypeVar("Result")


class Outcome(NamedTuple):
    """Outcome of a step for one request.

    Attributes:
        num_sampled: tokens that the step committed; 0 while its prompt is being read.
        num_verified: drafts that the step verified.
    """

    num_sampled: int
    num_verified: int


class StepRow(NamedTuple):
    """One request of the step that has just ended, with all tokens so far."""

    request: DraftRequest
    outcome: Outcome


class EngineDrafter:
    """Drafts for the requests of one engine.

    One in every worker process; the towers are on tensor-parallel rank 0 alone. Once loaded nothing of it raises: what
    cannot be drafted gets no drafts, is counted, and is logged once.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Checks the settings.

        Args:
            vllm_config: vLLM's; the knobs are in `additional_config["twotower"]`.

        Raises:
            TwoTowerError: the settings are refused.
        """
        self.num_speculative_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self.knobs, self._found = configuration_of(vllm_config)
        self._vllm_config = vllm_config
        self.session: DraftingRounds | None = None
        self.stats = DrafterStats(None)
        self._vocab_size = int(vllm_config.model_config.get_vocab_size())
        parallel = vllm_config.parallel_config
        # The rank is 0 in every engine of a dense model.
        self._engine = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
        self._round_end = time.perf_counter()
        self._round: Round | None = None
        # Rounds that are still to be left out, and those that were since the last one.
        self._num_to_rest = self._num_rested = 0
        # Seconds of the towers that are not counted yet, and of the whole round.
        self._untimed: tuple[PhaseTimes, float] | None = None
        # By what makes them different; None where nothing is to be drafted.
        self._policies: dict[tuple[object, ...], DraftPolicy | None] = {}
        self._is_off = self.knobs.policy == "off"
        self._faults = FaultHandler()
        self._sampler_failures = 0
        self._logged_at, self._logged = time.monotonic(), self.stats.copy()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Loads the towers and allocates the state, before vLLM measures what is left for its own cache.

        Args:
            device, dtype: of the verifier.

        Raises:
            TwoTowerError: the checkpoint is refused. Any other failure leaves vLLM without drafts.
        """
        # What fails here fails in the first verification too, where it is counted and logged.
        with suppress(Exception):
            warm_up(self._vocab_size, dtype, device, self.knobs.verification)
        if get_tensor_model_parallel_rank() != 0:
            return
        self.stats = DrafterStats(stats_path(self._engine))
        end_with_server()
        if self.knobs.policy == "off":
            logger.info("TwoTower: policy is off, nothing is loaded and nothing will be drafted")
            return
        try:
            self.session = self._load_session(device, dtype)
        except TwoTowerError:
            raise
        except Exception as error:
            self._faults.log(error, "loading failed; vLLM goes on without drafts until it is started again")
            return
        self._policies[self._policy_key(self.knobs)] = self.session.policy
        if isinstance(self.session, DraftingSession):
            for resource, size in zip(RESOURCES, self.knobs.pool_size(self._vllm_config), strict=True):
                self.stats.set("pool_size", size, resource)

    def _load_session(self, device: torch.device, dtype: torch.dtype) -> DraftingRounds:
        """Loads the denoiser alone where it can read the verifier's own state, and else both towers; says why."""
        if self._found.drafts_for_itself:
            hosted = self._load_hosted_session(device, dtype)
            if not isinstance(hosted, str):
                return hosted
            logger.info("TwoTower: the drafter has a context tower of its own beside the verifier's: %s", hosted)
        return self._load_own_session(device, dtype)

    def _load_own_session(self, device: torch.device, dtype: torch.dtype) -> DraftingRounds:
        """Loads both towers, and a pool for the contexts of requests."""
        return load_session(self.knobs, self._found, self._vllm_config, device, dtype, DraftingSession)

    def _load_hosted_session(self, device: torch.device, dtype: torch.dtype) -> DraftingRounds | str:
        """Loads the denoiser for a verifier that is the context tower, or says what keeps it from reading its state."""
        return "the state of this model runner is not read"

    def change_policy(self, changes: Mapping[str, Any]) -> None:
        """Drafts by other knobs from now on, of which those of the policy count; a policy keeps what it has learnt.

        Args:
            changes: as in `"twotower": {...}`; knobs that are not named are as at start.

        Raises:
            TwoTowerError: one is refused, or nothing was loaded because the policy was "off" at start.
        """
        knobs = DrafterKnobs.parse({**asdict(self.knobs), **changes})
        knobs.check_num_speculative_tokens(self.num_speculative_tokens, self._found.block_size)
        if self.knobs.policy == "off" != knobs.policy:
            raise ArgumentError(f'policy {knobs.policy!r} needs the towers, which "off" at start has left unloaded')
        if self.session is None:
            return
        key = self._policy_key(knobs)
        if key not in self._policies:
            self._policies[key] = knobs.policy_for(
                self.num_speculative_tokens, self._found.block_size, self.session.num_known
            )
        policy = self._policies[key]
        self._round, self._num_to_rest = None, 0  # its policy is not the one to be told
        self._is_off = policy is None
        self.session.reset()
        if policy is not None:
            self.session.policy = policy
            if isinstance(self.session, DraftingSession):
                self.session.drafter.first_token = knobs.first_token
            self.session.warm_up()

    def _policy_key(self, knobs: DrafterKnobs) -> tuple[object, ...]:
        full = knobs.resolved(self._found.block_size)
        return full.policy, full.block_size, full.steps_per_block, full.confidence_threshold

    def draft(
        self,
        num_reqs: int,
        read_rows: Callable[[], Sequence[StepRow]],
        gone: Callable[[Iterable[Hashable]], list[Hashable]],
    ) -> list[list[int]]:
        """Drafts for the next step; never raises.

        Args:
            num_reqs: requests of the step that has just ended.
            read_rows: says what became of each of them; what it raises is the drafter's fault too.
            gone: those of some requests that the runner has forgotten; they are forgotten here too.

        Returns:
            Per row, up to `num_speculative_tokens` drafts.
        """
        nothing: list[list[int]] = [[] for _ in range(num_reqs)]
        if self._num_to_rest and self._reason_to_rest() is None:
            self._num_to_rest, self._num_rested = self._num_to_rest - 1, self._num_rested + 1
            self._count_safely(lambda: self.stats.add("rounds", 1))
            self._count_fallbacks(num_reqs, "policy")
            self._round_end = time.perf_counter()
            return nothing
        return self._guarded(num_reqs, lambda session: self._draft(session, read_rows, gone), nothing)

    def _guarded(self, num_reqs: int, work: Callable[[DraftingRounds], Result], otherwise: Result) -> Result:
        """Does the work of a round; never raises.

        Args:
            num_reqs: requests that go without drafts where it fails, or is not to be done.
            work: what it raises is the drafter's fault.
            otherwise: the result of a round that fails, or is not to be made.
        """
        reason = self._reason_to_rest()
        if self.session is None or reason is not None:
            self._count_fallbacks(num_reqs, reason or "not loaded")
            return otherwise
        result = otherwise
        try:
            if self._faults.is_usable():
                result = work(self.session)
            else:
                self._count_fallbacks(num_reqs, "recovering")
        except Exception as error:
            self._recover(error, num_reqs)
        self._round_end = time.perf_counter()
        return result

    def _recover(self, error: Exception, num_reqs: int) -> None:
        """Goes on after a fault, which costs so many requests their drafts."""
        self._count_fallbacks(num_reqs, "error")
        self._round = None
        if self.session is not None:
            self._faults.recover(error, self.session.reset)

    def _count_fallbacks(self, num_reqs: int, reason: str) -> None:
        """Counts requests that go without drafts; never raises."""
        self._count_safely(lambda: self.stats.add("fallbacks", num_reqs, reason))

    def _count_safely(self, count: Callable[[], None]) -> None:
        """Counts something where nothing else would catch what that raises."""
        try:
            count()
        except Exception as error:
            self._faults.log(error, "a number could not be counted; /metrics lacks it")

    def _reason_to_rest(self) -> str | None:
        if self._is_off:
            return "policy"
        return "not loaded" if self.session is None else None

    def _draft(
        self,
        session: DraftingRounds,
        read_rows: Callable[[], Sequence[StepRow]],
        gone: Callable[[Iterable[Hashable]], list[Hashable]],
    ) -> list[list[int]]:
        start = time.perf_counter()
        self.forget(gone(session.request_ids))
        self._count_phases()
        rows = read_rows()
        finished, self._round = self._round, None
        if finished is not None:  # its requests are still here, so vLLM was busy with them all the time
            outcomes = {row.request.request_id: row.outcome for row in rows}
            self._observe(session, finished, start - self._round_end, outcomes)
        self.stats.add("rounds", 1)
        if self._faults.skips_round():
            self.stats.add("fallbacks", len(rows), "recovering")
            return [[] for _ in rows]
        self._round, self._num_rested = session.draft([row.request for row in rows]), 0
        self._num_to_rest = session.policy.num_rests
        self._faults.judge(self._round)
        self._count(session, self._round, time.perf_counter() - start)
        return self._as_given(self._round.block.rows(), rows)

    def _as_given(self, drafts: list[list[int]], rows: Sequence[StepRow]) -> list[list[int]]:
        """Drafts of a round's rows as the model runner takes them."""
        return drafts

    def _observe(
        self, session: DraftingRounds, finished: Round, verify_s: float, outcomes: Mapping[Hashable, Outcome]
    ) -> None:
        """Tells the policy, and counts, what became of a round's drafts.

        Args:
            session: that made them.
            finished: the round.
            verify_s: seconds of the step that verified them.
            outcomes: of all requests of that step.
        """
        block = finished.block
        present = [outcomes.get(request_id) for request_id in block.request_ids]
        verified = [
            min(drafted, one.num_verified) if one else 0
            for one, drafted in zip(present, block.num_draft_tokens, strict=True)
        ]
        accepted = [
            min(one.num_sampled - 1, asked) if one and one.num_sampled else None
            for one, asked in zip(present, verified, strict=True)
        ]
        if all(count is None for count in accepted):
            return
        ran = {request_id for request_id, count in zip(block.request_ids, accepted, strict=True) if count is not None}
        with_prompts = not ran.issuperset(outcomes)
        session.observe(finished, RoundResult(accepted, verify_s, verified, with_prompts, self._num_rested))
        self.stats.add("verify_seconds", verify_s * (1 + self._num_rested))
        if not any(verified):
            return
        self._calibrate(block.confidence.double().numpy(), accepted, verified)
        for count, asked in zip(accepted, verified, strict=True):
            if count is not None and asked:
                self.stats.add("drafts", 1)
                self.stats.add("draft_tokens", asked)
                self.stats.add("accepted_tokens", count)
                share = max(1 - ACCEPTANCE_MEMORY, 1 / self.stats.get("drafts"))
                length = self.stats.get("acceptance_length")
                self.stats.set("acceptance_length", length + share * (count + 1 - length))

    def announce(self, runner: Any, scheduler_output: Any) -> None:
        """Told by the hook of `execute_model` before every step, also of one that runs nothing; never raises.

        Args:
            runner: vLLM's, which holds this drafter.
            scheduler_output: vLLM's, of the step.
        """
        try:
            self.begin_step(runner, scheduler_output)
        except Exception as error:
            self._recover(error, 0)

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """Looks at a step that begins; arguments as of `announce`."""

    def forget(self, request_ids: Collection[Hashable]) -> None:
        """Releases requests that have ended: after the last one of all there is no round that would."""
        if self.session is None or not request_ids:
            return
        try:
            for request_id in request_ids:
                self.session.release(request_id)
                for policy in self._policies.values():  # those that were changed for another one, too
                    if policy is not None:
                        policy.forget(request_id)
            self._show_pool(self.session)
        except Exception as error:
            self._faults.log(error, "the state of a request that has ended could not be released")

    def count_sampler_failures(self, failures: int) -> None:
        """Counts steps that vLLM's own sampler took over; never raises.

        Args:
            failures: of our sampler, since it was made.
        """
        new, self._sampler_failures = failures - self._sampler_failures, failures
        self._count_safely(lambda: self.stats.add("sampler_fallbacks", new))

    def _calibrate(
        self, confidence: npt.NDArray[np.float64], accepted: Sequence[int | None], verified: Sequence[int]
    ) -> None:
        """Counts drafts up to the first that was rejected, by their confidence."""
        kept = np.array([count or 0 for count in accepted])[:, None]
        asked = np.array([0 if count is None else n for count, n in zip(accepted, verified, strict=True)])[:, None]
        position = np.arange(confidence.shape[1])
        decided = position < np.minimum(kept + 1, asked)
        self.stats.add_decided(confidence[decided], (position < kept)[decided])

    def _count(self, session: DraftingRounds, drafted: Round, drafting_s: float) -> None:
        stats, block = self.stats, drafted.block
        stats.add("denoiser_passes", max(block.num_denoiser_passes, default=0))
        stats.add("request_denoiser_passes", sum(block.num_denoiser_passes))
        stats.add("context_tokens", drafted.num_context_tokens)
        for reason, count in drafted.without_drafts.items():
            stats.add("fallbacks", count, reason)
        self._show_pool(session)
        self._untimed = drafted.times, drafting_s
        if drafted.times.known:
            self._count_phases()
        now = time.monotonic()
        if self.knobs.log_interval_s and now - self._logged_at >= self.knobs.log_interval_s:
            line = log_line(stats, self._logged)
            if line:
                logger.info("%s", line)
            self._logged_at, self._logged = now, stats.copy()

    def _show_pool(self, session: DraftingRounds) -> None:
        if not isinstance(session, DraftingSession):
            return
        held = session.request_ids
        self.stats.set("pool_used", len(held), "requests")
        self.stats.set("pool_used", sum(map(session.state.num_computed_tokens, held)), "tokens")

    def _count_phases(self) -> None:
        """Counts a round's seconds: at once where its passes are over, else when the next one begins. Nothing waits."""
        if self._untimed is None:
            return
        (times, drafting_s), self._untimed = self._untimed, None
        self.stats.add("drafting_seconds", times.extend_s, "extend")
        self.stats.add("drafting_seconds", times.denoise_s, "denoise")
        self.stats.add("drafting_seconds", max(0.0, drafting_s - times.extend_s - times.denoise_s), "host")


def announcing_steps(attribute: str) -> Callable[[Any], Any]:
    """Makes a wrapper of `execute_model` that tells our drafter of every step before it runs, and whose runner it is.

    Args:
        attribute: of the runner, in which the drafter is.
    """

    def announcing(stock: Any) -> Any:
        @wraps(stock)
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            drafter = getattr(self, attribute, None)
            if isinstance(drafter, EngineDrafter):
                drafter.announce(self, scheduler_output)
            return stock(self, scheduler_output, *args, **kwargs)

        return execute_model

    return announcing


def filled(drafts: list[int], request: DraftRequest, count: int) -> list[int]:
    """Drafts of a row, up to a count by repeating the last of them, or the request's last token."""
    last = drafts[-1] if drafts else int(request.token_ids[-1])
    return drafts + [last] * (count - len(drafts))
