"""Questions of tests to the workers of a tensor-parallel engine; vLLM mixes them into its worker class."""

from __future__ import annotations

import itertools
from typing import Any

from tests.vllm_plugin.engine import is_on_v2
from vllm_twotower.runner import drafter_of


class RankReport:
    """Methods that `LLM.collective_rpc` can call by name."""

    model_runner: Any

    def token_rows(self) -> dict[str, list[int]]:
        """Token ids that this rank holds for every request, prompt and output."""
        if is_on_v2():
            states = self.model_runner.req_states
            return {
                request_id: states.all_token_ids.gpu[slot, : int(states.total_len.gpu[slot])].tolist()
                for request_id, slot in states.req_id_to_index.items()
            }
        batch = self.model_runner.input_batch
        lengths = batch.num_tokens_no_spec[: batch.num_reqs].tolist()
        return {
            request_id: batch.token_ids_cpu[i, :length].tolist()
            for i, (request_id, length) in enumerate(zip(batch.req_ids, lengths, strict=True))
        }

    def has_towers(self) -> bool:
        """Whether the TwoTower model is in this process."""
        return self._drafter().session is not None

    def accepted_tokens(self) -> float:
        """Accepted drafts, as the drafter of this rank counts them."""
        return float(self._drafter().stats.get("accepted_tokens"))

    def errors(self) -> float:
        """Requests without drafts because of a fault, as the drafter of this rank counts them."""
        return float(self._drafter().stats.get("fallbacks", "error"))

    def fail_every_other_round(self) -> None:
        """Makes rounds raise where the towers are."""
        if not self.has_towers():
            return
        session, calls = self._drafter().session, itertools.count()
        name = "draft_ahead" if is_on_v2() else "draft"
        real = getattr(session, name)

        def failing(*given: Any) -> Any:
            drafted = real(*given)
            if next(calls) % 2 == 0:
                raise RuntimeError("injected")
            return drafted

        setattr(session, name, failing)

    def _drafter(self) -> Any:
        return drafter_of(self.model_runner)
