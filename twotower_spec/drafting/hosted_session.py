"""HostedSession: drafts for a target that is the model's own context tower, from the state that its host holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from twotower_spec.drafting.admission import Admitted
from twotower_spec.drafting.block_drafter import BlockDrafter
from twotower_spec.drafting.draft_block import Noise
from twotower_spec.drafting.policies import DraftPlan, DraftPolicy
from twotower_spec.drafting.round import DraftRequest
from twotower_spec.drafting.rounds import TRIAL_ROWS, DrafterMemory, DraftingRounds
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state import ContextSource, ContextState
from twotower_spec.state.context_state import RequestId
from twotower_spec.towers.model import TwoTowers

logger = logging.getLogger(__name__)


class HostedSession(DraftingRounds):
    """Drafts from contexts that the target keeps, up to the token before the newest one of each request.

    The target is the context tower itself, run by a serving engine or whoever else: it has chosen the newest token of a
    request and not read it yet. A block begins with that token, as in self-speculative generation, and brings drafts
    for all positions but this one. No context tower is needed here, no pool and no pass that brings it up to date.
    """

    num_known = 1

    def __init__(
        self,
        towers: TwoTowers,
        source: ContextSource,
        policy: DraftPolicy | None = None,
        *,
        sampler: Sampler | None = None,
        noise: Noise = "private",
        seed: int = 0,
        num_token_ids: int | None = None,
    ) -> None:
        """Allocates nothing large.

        Args:
            towers: the model, of which the denoiser is needed alone.
            source: of the contexts; it reads in the denoiser's dtype, on its device.
            policy, sampler, noise, seed, num_token_ids: as in `DraftingSession`.

        Raises:
            ArgumentError: an argument is out of range, the model has no denoiser, or blocks have no room for drafts.
        """
        super().__init__(towers, policy, noise, seed, num_token_ids)
        if min(self._block_sizes(), default=2) < 2:
            raise ArgumentError(
                "blocks of 1 hold the newest token and no draft; give a policy with blocks of 2 or more"
            )
        self.source: ContextSource = source
        self.drafter = BlockDrafter(
            towers,
            first_token="denoiser",
            sampler=sampler or Sampler(),
            noise=noise,
            num_token_ids=self.num_token_ids,
        )

    @property
    def num_speculative_tokens(self) -> int:
        """Most drafts of any round."""
        return min(super().num_speculative_tokens, max(self._block_sizes()) - 1)

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """No requests: nothing of them is held here."""
        return ()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs the denoiser on an empty context, without CUDA graphs, as is logged; see `DraftingRounds.warm_up`."""
        denoiser = self.towers.denoiser
        if denoiser.device.type == "cuda":
            logger.info(
                "blocks on %s run without CUDA graphs: these would hold addresses of states that are the target's",
                denoiser.device,
            )
        trial = ContextState(self.towers.config, TRIAL_ROWS, TRIAL_ROWS, denoiser.dtype, denoiser.device)
        for name in range(TRIAL_ROWS):
            trial.claim(name)
        own, self.source = self.source, trial
        try:
            for num_rows in (1, TRIAL_ROWS):
                for extend_s in (None, 0.0):  # the first pass of a kind makes what is made once
                    self._warm_up_blocks(trial.slots(range(num_rows)), extend_s=extend_s)
        finally:
            self.source = own

    def memory(self) -> DrafterMemory:
        """See `DraftingRounds.memory`."""
        denoiser = self.towers.denoiser
        return DrafterMemory(
            denoiser_tower_bytes=sum(parameter.nbytes for parameter in denoiser.parameters()),
            workspace_bytes=self.source.workspace_nbytes + self.drafter.nbytes,
            denoiser_device=denoiser.device,
        )

    def _num_unread(self, request_id: RequestId, num_tokens: int) -> int:
        return 0

    def _read(self, wanting: Sequence[DraftRequest], times: PhaseTimes, plan: DraftPlan) -> Admitted:
        """Finds all contexts up to date."""
        vocab_size = self.towers.config.vocab_size
        ready = [one for one in wanting if len(one.token_ids) and 0 <= int(one.token_ids[-1]) < vocab_size]
        refused = {one.request_id: "foreign token" for one in wanting if one not in ready}
        return Admitted({}, [], ready, refused)

    def _restart(self, request_id: RequestId) -> None:
        """Does nothing: the host has the context."""
