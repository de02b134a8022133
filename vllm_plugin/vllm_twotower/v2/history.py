"""Token ids of the requests that vLLM's model runner V2 holds on the device, learnt by the host a step late."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower_spec.drafting import AsyncRound
from twotower_spec.state.transfer import HostCopy, Moment
from vllm_twotower.drafter import Outcome


@dataclass
class KnownTokens:
    """Tokens of a request as far as the host knows them.

    Attributes:
        slot: of vLLM's request states.
        length: tokens that are known, from the first one on.
        num_under_way: steps that have committed tokens of it that are not known yet.
        has_gap: whether something between was missed.
    """

    slot: int
    length: int
    num_under_way: int = 0
    has_gap: bool = False


@dataclass
class Step:
    """One step of the engine, whose results are on their way to the host.

    Attributes:
        known: of its requests, in the order of its rows.
        samples: whether it commits tokens of each; else it has read a piece of the prompt.
        num_verified: drafts that it verified, per request.
        copy: int64 [num_reqs, 2 + width]: lengths, committed tokens, and the last token ids.
        begun: when the device is done with it.
        ended: when its drafts are there; None as long as they are being made.
        drafted: the drafts; None where there was no round.
    """

    request_ids: list[str]
    known: list[KnownTokens]
    samples: npt.NDArray[np.bool_]
    num_verified: list[int]
    copy: HostCopy
    begun: Moment
    ended: Moment | None = None
    drafted: AsyncRound | None = None

    @property
    def landed(self) -> bool:
        """Whether its results are on the host, those of its drafts too."""
        return self.copy.landed and (self.drafted is None or self.drafted.landed)

    def outcomes(self) -> Mapping[Hashable, Outcome]:
        """Outcomes of its requests."""
        num_sampled = self.copy.read()[0][:, 1].tolist()
        return dict(zip(self.request_ids, map(Outcome, num_sampled, self.num_verified), strict=True))


class TokenHistory:
    """Follows V2's rows of token ids: a step is one copy from the device that nobody waits for."""

    def __init__(self, req_states: Any, most_per_step: int) -> None:
        """Begins empty; the system gives memory to a row when it is written.

        Args:
            req_states: vLLM's `RequestState`.
            most_per_step: tokens that a step can commit at most for one request.
        """
        self._states, self._width = req_states, most_per_step
        self._rows = np.zeros(tuple(req_states.all_token_ids.gpu.shape), dtype=np.int32)
        self._known: dict[str, KnownTokens] = {}
        # Of requests that have not been in a step yet.
        self._prompts: dict[str, Sequence[int]] = {}
        self.under_way: deque[Step] = deque()

    def begin(self, request_id: str, token_ids: Sequence[int] | None) -> None:
        """Takes a request that is new, or comes back; None where its token ids are not known."""
        self.forget(request_id)
        if token_ids is not None:
            self._prompts[request_id] = token_ids

    def forget(self, request_id: str) -> None:
        """Drops a request that has ended; unknown ids are ignored."""
        self._known.pop(request_id, None)
        self._prompts.pop(request_id, None)

    def token_ids(self, known: KnownTokens) -> npt.NDArray[np.int32]:
        """Token ids that the host knows; a view, valid until the request ends."""
        return self._rows[known.slot, : known.length]

    def token_ids_of(self, request_ids: Sequence[Any]) -> Mapping[Any, npt.NDArray[np.int32]]:
        """Token ids that the host knows of those requests that are still there."""
        return {one: self.token_ids(self._known[one]) for one in request_ids if one in self._known}

    def most_tokens(self, known: KnownTokens) -> int:
        """Bounds how many tokens a request has by now."""
        bound: int = self._rows.shape[1]
        return min(known.length + self._width * known.num_under_way, bound)

    def follow(self, input_batch: Any, num_sampled: Tensor) -> Step:
        """Begins to learn what a step has brought.

        Args:
            input_batch: vLLM's, of the step.
            num_sampled: int32 [num_reqs], on the device.
        """
        idx, slots = input_batch.idx_mapping, input_batch.idx_mapping_np.tolist()
        begun = Moment(idx.device)
        request_ids = list(input_batch.req_ids)
        samples = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        samples = samples[: len(request_ids)] >= input_batch.prefill_len_np[: len(request_ids)]
        known = [self._find(request_id, slot) for request_id, slot in zip(request_ids, slots, strict=True)]
        step = Step(
            request_ids=request_ids,
            known=known,
            samples=samples,
            num_verified=(np.diff(input_batch.cu_num_logits_np) - 1).tolist(),
            copy=HostCopy(self._news(idx, num_sampled)),
            begun=begun,
        )
        for one, samples_one in zip(known, samples.tolist(), strict=True):
            one.num_under_way += samples_one
        self.under_way.append(step)
        return step

    def next_landed(self) -> Step | None:
        """Takes the oldest step whose results have landed, and learns its tokens; None where there is none."""
        if not self.under_way or not self.under_way[0].landed:
            return None
        step = self.under_way.popleft()
        news = step.copy.read()[0].numpy()
        for request_id, known, samples, (length, _, *_), tail in zip(
            step.request_ids, step.known, step.samples.tolist(), news, news[:, 2:], strict=True
        ):
            if self._known.get(request_id) is not known:
                continue
            known.num_under_way -= samples
            num_new = int(length) - known.length
            if num_new > self._width:
                known.has_gap = True
            elif num_new > 0:
                self._rows[known.slot, known.length : length] = tail[self._width - num_new :]
                known.length = int(length)
        return step

    def _news(self, idx_mapping: Tensor, num_sampled: Tensor) -> Tensor:
        """Lengths, committed tokens and last token ids of requests, int64 [num_reqs, 2 + width]."""
        lengths = self._states.total_len.gpu[idx_mapping].long()[:, None]
        places = lengths - self._width + torch.arange(self._width, device=lengths.device)
        tails = self._states.all_token_ids.gpu[idx_mapping[:, None], places.clamp_(min=0)]
        return torch.cat([lengths, num_sampled[:, None], tails], dim=1)

    def _find(self, request_id: str, slot: int) -> KnownTokens:
        """Looks up a request; one whose tokens were not followed is read from the device, which waits for it."""
        known = self._known.get(request_id)
        if known is not None and known.slot == slot and not known.has_gap:
            return known
        prompt = self._prompts.pop(request_id, None)
        if prompt is None:
            length = int(self._states.total_len.gpu[slot])
            prompt = self._states.all_token_ids.gpu[slot, :length].cpu().numpy()
        self._rows[slot, : len(prompt)] = prompt
        self._known[request_id] = KnownTokens(slot, len(prompt))
        return self._known[request_id]
