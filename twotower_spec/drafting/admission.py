"""Admission of requests to a round: which fit into the pool, which start over, and what is read of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower_spec.drafting.round import DraftRequest
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import RequestId, take_within_budget
from twotower_spec.state.token_history import TokenSequence, all_below


@dataclass(frozen=True)
class Admitted:
    """Division of a round's requests: who is read, who can be drafted for, and who goes without.

    Attributes:
        increments: token ids that the context tower reads, per request, in the order of one pass.
        completed: requests of `increments` whose context is up to date after it: its logits are those to go on from.
        ready: requests whose context is up to date after the round, in the order given.
        refused: reasons of those that are not read at all, "foreign token" or "no room".
        num_waiting: requests that are not read to their end yet.
        foreseen: of requests that were read late, whether the context tower would have picked each token but the first.
    """

    increments: dict[RequestId, list[int]]
    completed: list[RequestId]
    ready: list[DraftRequest]
    refused: dict[RequestId, str] = field(default_factory=dict)
    num_waiting: int = 0
    foreseen: dict[RequestId, list[bool]] = field(default_factory=dict)

    @property
    def without_drafts(self) -> Counter[str]:
        """Number of requests that cannot be drafted for, by reason."""
        return Counter(self.refused.values()) + Counter(prefilling=self.num_waiting)


class Admission:
    """Decides over the requests of every round; the pool's room for them is claimed, nothing is read yet.

    Requests with the fewest new tokens go first, so that a long prompt delays nobody. A request whose tokens do not
    continue what was read, or whose last logits are gone, starts over, alone.
    """

    def __init__(self, state: ContextState, token_budget: int, vocab_size: int) -> None:
        """Looks after a pool.

        Args:
            state: the pool.
            token_budget: most tokens that the context tower reads in a round; the rest of a prompt waits.
            vocab_size: a request with a token id from this one on cannot be read.
        """
        self.state, self.token_budget, self.vocab_size = state, token_budget, vocab_size
        # Requests whose last token's logits are kept.
        self._with_logits: set[RequestId] = set()

    def admit(self, requests: Sequence[DraftRequest], most_tokens: int | None = None) -> Admitted:
        """Claims room for the requests that fit together, and chooses what is read of them.

        Args:
            requests: of the round.
            most_tokens: that are read, within the budget; None for the budget.
        """
        new, refused = self._fitting(requests)
        for request_id, tokens in new.items():  # all before the pass, so that none gives way to another one
            self.state.claim(request_id, self.state.num_computed_tokens(request_id) + len(tokens), keep=list(new))
        budget = self.token_budget if most_tokens is None else min(self.token_budget, most_tokens)
        increments = take_within_budget({rid: tokens for rid, tokens in new.items() if len(tokens)}, budget)
        completed = [request_id for request_id, tokens in increments.items() if len(tokens) == len(new[request_id])]
        kept = {request_id for request_id in self._with_logits if request_id in self.state}
        self._with_logits = (kept - increments.keys()).union(completed)
        waiting = {request_id for request_id, tokens in new.items() if len(tokens)}.difference(completed)
        ready = [one for one in requests if one.request_id in new and one.request_id not in waiting]
        return Admitted(increments, completed, ready, refused, len(waiting))

    def restart(self, request_id: RequestId) -> None:
        """Forgets what was read of a request, which is read again when it comes back."""
        self.state.restart(request_id)
        self._with_logits.discard(request_id)

    def release(self, request_id: RequestId) -> None:
        """Forgets a request; unknown ids are ignored."""
        self.state.release(request_id)
        self._with_logits.discard(request_id)

    def reset(self) -> None:
        """Forgets all requests."""
        self.state.reset()
        self._with_logits.clear()

    def _fitting(self, requests: Sequence[DraftRequest]) -> tuple[dict[RequestId, TokenSequence], dict[RequestId, str]]:
        """New tokens of the requests whose states fit into the pool together, the fewest first; why others do not."""
        state = self.state
        new = {one.request_id: one.token_ids[self._known(one.request_id, one.token_ids) :] for one in requests}
        fitting: dict[RequestId, TokenSequence] = {}
        refused: dict[RequestId, str] = {}
        num_pages = 0
        for one in sorted(requests, key=lambda one: len(new[one.request_id])):
            needed = state.pages_for(len(one.token_ids))
            if len(fitting) >= state.num_slots or num_pages + needed > state.num_pages:
                refused[one.request_id] = "no room"
            elif not len(one.token_ids) or not all_below(new[one.request_id], self.vocab_size):
                refused[one.request_id] = "foreign token"
            else:
                fitting[one.request_id] = new[one.request_id]
                num_pages += needed
        return fitting, refused

    def _known(self, request_id: RequestId, token_ids: TokenSequence) -> int:
        """Counts the tokens whose state is held and will do; a request whose state will not do starts over.

        So does one whose last logits are gone, which a complete state could not give again, and one that holds more
        room than it needs.
        """
        state = self.state
        count = state.continue_or_restart(request_id, token_ids)
        if request_id in state:
            lacks_logits = count == len(token_ids) and request_id not in self._with_logits
            if lacks_logits or state.num_pages_of(request_id) > state.pages_for(max(len(token_ids), 1)):
                state.restart(request_id)
                count = 0
        if not count:
            self._with_logits.discard(request_id)
        return count
