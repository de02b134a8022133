"""Questions of tests to the workers of a tensor-parallel engine; vLLM mixes them into its worker class."""

from __future__ import annotations

from typing import Any


class RankReport:
    """Methods that `LLM.collective_rpc` can call by name."""

    model_runner: Any

    def token_rows(self) -> dict[str, list[int]]:
        """Token ids that this rank holds for every request, prompt and output."""
        batch = self.model_runner.input_batch
        lengths = batch.num_tokens_no_spec[: batch.num_reqs].tolist()
        return {
            request_id: batch.token_ids_cpu[i, :length].tolist()
            for i, (request_id, length) in enumerate(zip(batch.req_ids, lengths, strict=True))
        }

    def has_towers(self) -> bool:
        """Whether the TwoTower model is in this process."""
        return self.model_runner.drafter.session is not None

    def accepted_tokens(self) -> float:
        """Accepted drafts, as the proposer of this rank counts them."""
        return float(self.model_runner.drafter.stats.get("accepted_tokens"))
