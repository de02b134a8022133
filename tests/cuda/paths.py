"""Everything that runs on devices, called by name on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.drafting.rounds import draft_rows
from tests.support.builders import tiny_config
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import (
    AdaptivePolicy,
    AsyncRequest,
    AsyncSession,
    DraftingSession,
    DraftPolicy,
    FixedPolicy,
    ThresholdPolicy,
)
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state.window import TokenTable

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7], [11] * 20]


def placed(context_device: str = "cpu", denoiser_device: str = "cpu", pattern: str = "M*E") -> TwoTowerModel:
    """The same model on any devices, small enough for kernels in the interpreter."""
    config = tiny_config(
        hybrid_override_pattern=pattern, mamba_num_heads=2, num_attention_heads=2, num_key_value_heads=1
    )
    source = TwoTowerModel.from_config(config, dtype="float32")
    if context_device == denoiser_device == "cpu":
        return source
    model = TwoTowerModel(config, torch.float32, context_device, denoiser_device)
    for of_model, of_source in ((model.context, source.context), (model.denoiser, source.denoiser)):
        for to, values in zip(of_model.parameters(), of_source.parameters(), strict=True):
            to.data.copy_(values)
    return model


def drafts(model: TwoTowerModel, policy: DraftPolicy, **options: Any) -> list[list[int]]:
    """Drafts of a session that goes on after a first round."""
    session = DraftingSession(model, policy, num_slots=3, num_tokens=256, **options)
    first = draft_rows(session, {"a": PROMPTS[0], "b": PROMPTS[1]})
    rows = {"a": PROMPTS[0] + first.row(0)[:2], "b": PROMPTS[1] + first.row(1)[:1] + [4], "c": PROMPTS[2]}
    block = draft_rows(session, rows)
    return [block.row(row) for row in range(3)]


class AheadOfHost:
    """An `AsyncSession`, its token table, and what it drafts round by round."""

    def __init__(
        self,
        model: TwoTowerModel,
        policy: DraftPolicy,
        prompts: Sequence[list[int]] = PROMPTS[:2],
        **options: Any,
    ) -> None:
        self.session = AsyncSession(model, policy, most_per_step=6, **{"num_slots": 3, "num_tokens": 256, **options})
        self.device = model.context.device
        self.tokens = [list(prompt) for prompt in prompts]
        self.known = [list(prompt) for prompt in prompts]
        self.table = TokenTable(
            torch.zeros(len(prompts), 128, dtype=torch.int32, device=self.device),
            torch.zeros(len(prompts), dtype=torch.int32, device=self.device),
        )
        self.commit([[4]] * len(prompts))

    def commit(self, new: Sequence[list[int]]) -> None:
        """Gives the requests tokens of which the host does not know."""
        for row, tokens in enumerate(new):
            self.tokens[row] += tokens
            self.table.token_ids[row, : len(self.tokens[row])] = torch.tensor(self.tokens[row], dtype=torch.int32)
            self.table.lengths[row] = len(self.tokens[row])

    def requests(self) -> list[AsyncRequest]:
        return [
            AsyncRequest(row, row, known, len(all_tokens) + 6)
            for row, (known, all_tokens) in enumerate(zip(self.known, self.tokens, strict=True))
        ]

    def round(self, requests: Sequence[AsyncRequest]) -> list[list[int]]:
        """One round, settled; a row for each of its requests."""
        done = self.session.draft_ahead(requests, self.table)
        self.known = [list(tokens) for tokens in self.tokens]
        block = self.session.settle(done, dict(enumerate(self.known))).block
        return [block.row(row) for row in range(len(requests))]


def ahead(serving: AheadOfHost) -> list[list[list[int]]]:
    """Three rounds ahead of the host."""
    found = []
    for _ in range(3):
        found.append(serving.round(serving.requests()))
        serving.commit([[7, 8, 9], *[[9]] * (len(serving.tokens) - 1)])
    return found


PATHS: dict[str, Callable[[TwoTowerModel], Any]] = {
    "ar": lambda model: model.generate_ar(PROMPTS, max_new_tokens=3).token_ids,
    "ar, sampled": lambda model: (
        model.generate_ar(PROMPTS, max_new_tokens=3, temperature=0.8, top_p=0.9, seed=1).token_ids
    ),
    "mock_ar": lambda model: model.generate_mock_ar(PROMPTS[:1], max_new_tokens=2).token_ids,
    "mask_diffusion": lambda model: (
        model.generate_mask_diffusion(PROMPTS, max_new_tokens=8, block_size=4, steps_per_block=3).token_ids
    ),
    "mask_diffusion, sampled": lambda model: (
        model.generate_mask_diffusion(
            PROMPTS[:2], max_new_tokens=4, block_size=4, steps_per_block=4, temperature=0.7, top_k=5, seed=3
        ).token_ids
    ),
    "self_speculative": lambda model: (
        model.generate_self_speculative(PROMPTS[:2], max_new_tokens=6, block_size=4, seed=1).token_ids
    ),
    "drafts": lambda model: drafts(model, FixedPolicy(8, 1)),
    "drafts, sampled": lambda model: drafts(model, FixedPolicy(8, 1), sampler=Sampler(0.8)),
    "drafts, several steps": lambda model: drafts(model, ThresholdPolicy(8, 3, 0.05)),
    "drafts, adaptive": lambda model: drafts(model, AdaptivePolicy([8], most_steps=1, may_skip=False)),
    "drafts ahead": lambda model: ahead(AheadOfHost(model, FixedPolicy(8, 1, num_tokens=5))),
    "drafts ahead, several steps": lambda model: ahead(AheadOfHost(model, ThresholdPolicy(4, 3, 0.05))),
}
