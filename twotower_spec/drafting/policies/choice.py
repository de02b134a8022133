"""The decision: which requests are drafted for, and with which block.

For every block size the requests are taken in the order of what their drafts are expected to bring, and the rate of the
first n of them,

    (num_reqs + expected accepted drafts) / round_seconds                     (costs.py, acceptance.py)

is compared over n and block sizes with that of no drafts, num_reqs / plain(num_reqs). Where an engine verifies as many
drafts of every request, n is all of them, and their number is what is compared. A draft is worth verifying where its
chance is above the price of a token, rate * extra / drafts. A context that lags behind is paid for over the tokens that
its request is expected to bring.

Requests are of a kind when they come together, so that what was seen of others may hold for none of them: those of
which nothing was seen join one by one, and then as many as are drafted for already.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from twotower_spec.drafting.policies.acceptance import Acceptance, Array
from twotower_spec.drafting.policies.costs import RoundCosts, round_seconds
from twotower_spec.drafting.policies.policy import Candidate

SHORTEST_ROUND = 1e-9


@dataclass
class Load:
    """State of the decision for batches of about one size.

    Attributes:
        block_size: of the last round; 0 without drafts.
        num_same: rounds since it has been so, with those that were left out.
        num_refreshed: rounds that refreshed the times of something else.
        refreshing: what the last such round drafts, until it is over: a block size, or 0.
        share_drafted: of the requests that were planned for; some have no room, or are not read yet.
        share_denoised: of the rounds in which contexts were read; in others no first draft was probable enough.
        passes: mean of the denoiser, by block size.
    """

    block_size: int = 0
    num_same: int = 0
    num_refreshed: int = 0
    refreshing: int | None = None
    share_drafted: float = 1.0
    share_denoised: float = 1.0
    passes: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: 1.0))


@dataclass(frozen=True)
class Choice:
    """One block size, for the requests for which it is best.

    Attributes:
        block_size: positions that are denoised.
        rows: places of the candidates.
        num_tokens: most drafts of a request.
        rate: tokens per second.
        token_price: in tokens, for verifying one more.
        steady_s: seconds of reading, contexts that lag behind left out.
    """

    block_size: int
    rows: list[int]
    num_tokens: int
    rate: float = math.inf
    token_price: float = 0.0
    steady_s: float = 0.0


class Chooser:
    """Weighs block sizes by what rounds cost and drafts are expected to bring."""

    def __init__(self, costs: RoundCosts, acceptance: Acceptance) -> None:
        """Weighs by these, as they are when it is asked."""
        self.costs, self.acceptance = costs, acceptance

    def plain_rate(self, num_reqs: int) -> float:
        """Tokens per second without drafts."""
        return num_reqs / max(self.costs.plain.at(num_reqs), SHORTEST_ROUND)

    def choose(
        self, size: int, num_reqs: int, candidates: Sequence[Candidate], rows: Sequence[int], load: Load
    ) -> Choice:
        """The requests for which blocks of a size bring most.

        Args:
            size: of the blocks.
            num_reqs: requests of the round.
            candidates: all of them.
            rows: places of those that may be drafted for, at least one.
            load: what was decided lately.
        """
        costs, survival = self.costs, self._survival(candidates, rows, size)
        plain_s, places = costs.plain.at(num_reqs), np.arange(1, len(rows) + 1, dtype=np.float64)
        token_s, rate = costs.extra.at(survival.size) / survival.size, self.plain_rate(num_reqs)
        denoise_s, host_s = costs.denoise(size).over(places), costs.host.at(len(rows))
        # The price of a token follows from the best rate, which follows from it; this is near enough after two turns.
        for _ in range(2):
            price = rate * token_s
            worth = survival > price
            worth[:, 0] = True
            gains, num_drafts = (survival * worth).sum(axis=1), worth.sum(axis=1).astype(np.float64)
            steady, overdue = gains + 1, self._overdue(candidates, rows, gains)
            value = gains - price * num_drafts - rate * costs.extend.over(overdue)
            order = np.argsort(-value, kind="stable")
            verify_s = plain_s + costs.extra.over(num_drafts[order].cumsum())
            extend_s = costs.extend.over((steady + overdue)[order].cumsum())
            seconds = round_seconds(verify_s, extend_s, denoise_s, load.share_denoised * load.passes[size], host_s)
            rates = (num_reqs + load.share_drafted * gains[order].cumsum()) / np.maximum(seconds, SHORTEST_ROUND)
            most = int(rates.argmax()) + 1
            rate = float(rates[most - 1])
        steady_s = costs.extend.at(float(steady[order[:most]].sum()))
        return Choice(size, self._joining(candidates, [rows[i] for i in order[:most]]), size, rate, price, steady_s)

    def choose_for_all(
        self, size: int, num_reqs: int, candidates: Sequence[Candidate], rows: Sequence[int], load: Load
    ) -> Choice:
        """The number of drafts, of all requests alike, at which blocks of a size bring most; see `choose`."""
        costs, survival = self.costs, self._survival(candidates, rows, size)
        gains = survival.cumsum(axis=1).sum(axis=0)
        steady, overdue = gains + len(rows), self._overdue(candidates, rows, survival.sum(axis=1)).sum()
        verify_s = costs.plain.at(num_reqs) + costs.extra.over(num_reqs * np.arange(1, size + 1, dtype=np.float64))
        denoise_s = np.full(size, costs.denoise(size).at(len(rows)))
        extend_s, host_s = costs.extend.over(steady + overdue), costs.host.at(len(rows))
        seconds = round_seconds(verify_s, extend_s, denoise_s, load.passes[size], host_s)
        rates = (num_reqs + load.share_drafted * gains) / np.maximum(seconds, SHORTEST_ROUND)
        best = int(rates.argmax())
        steady_s = costs.extend.at(float(steady[best]))
        return Choice(size, list(rows), best + 1, float(rates[best]), steady_s=steady_s)

    def worth_denoising(
        self, size: int, request_ids: Sequence[Hashable], first: Array, limits: Sequence[int], rate: float
    ) -> list[bool]:
        """Requests that are worth their denoising and verification, by the chances of their first drafts.

        Those in the order of what they bring are taken as far as

            expected accepted drafts - rate * (denoise(rows) + extra(drafts))

        grows, if it comes to more than nothing.

        Args:
            size: of the blocks.
            request_ids: of the rows.
            first: chance [num_reqs] that the first draft is accepted.
            limits: most drafts of each request.
            rate: tokens per second.
        """
        survival = self._limited(self.acceptance.survival(request_ids, size), limits)
        survival *= (first / survival[:, 0])[:, None]
        worth = survival > rate * self.costs.extra.at(survival.size) / survival.size
        worth[:, 0] = True
        gains, num_drafts = (survival * worth).sum(axis=1), worth.sum(axis=1).astype(np.float64)
        order, places = np.argsort(-gains, kind="stable"), np.arange(1, len(gains) + 1, dtype=np.float64)
        seconds = self.costs.denoise(size).over(places) + self.costs.extra.over(num_drafts[order].cumsum())
        net = gains[order].cumsum() - rate * seconds
        most = int(net.argmax()) + 1 if net.max() > 0 else 0
        chosen = set(order[:most].tolist())
        return [row in chosen for row in range(len(gains))]

    def _joining(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[int]:
        """Those of some rows that are drafted for by now: not many at once of which nothing was seen yet."""
        known = {row for row in rows if self.acceptance.is_known(candidates[row].request_id)}
        new = [row for row in rows if row not in known][: 1 + len(known)]
        return [row for row in rows if row in known or row in new]

    def _survival(self, candidates: Sequence[Candidate], rows: Sequence[int], size: int) -> Array:
        """Chance [num_rows, size] that all drafts up to each position are accepted, of those that a request can use."""
        survival = self.acceptance.survival([candidates[row].request_id for row in rows], size)
        return self._limited(survival, [candidates[row].max_draft_tokens for row in rows])

    @staticmethod
    def _limited(survival: Array, limits: Sequence[int | None]) -> Array:
        for row, most in enumerate(limits):
            if most is not None:
                survival[row, most:] = 0.0
        return survival

    def _overdue(self, candidates: Sequence[Candidate], rows: Sequence[int], gains: Array) -> Array:
        """Tokens [num_rows] by which contexts lag behind, shared out over the rounds that requests are good for."""
        unread = np.array([candidates[row].num_unread for row in rows], dtype=np.float64)
        mean = self.acceptance.mean_tokens or math.inf
        expected = np.array([max(mean, self.acceptance.num_tokens(candidates[row].request_id)) for row in rows])
        shared: Array = np.clip(unread - gains - 1, 0.0, None) / np.maximum(expected / (gains + 1), 1.0)
        return shared
