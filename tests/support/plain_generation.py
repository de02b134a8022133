"""Three modes of generation for one row on the plain towers: the published loops, written out."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.support.plain_model import PlainTower
from twotower_kernels.noise.reference import gumbel_noise_reference
from twotower_spec import TwoTowerModel

Memory = dict[int, list[Tensor]]


@dataclass(frozen=True)
class Noise:
    """Sampler at a temperature, with the noise of a seed."""

    temperature: float
    seed: int

    def scores(self, logits: Tensor, position: int, draw: int = 0) -> Tensor:
        noise = [gumbel_noise_reference(self.seed, position, draw, token) for token in range(len(logits))]
        return logits / self.temperature + torch.tensor(noise).double()


def pick(logits: Tensor, noise: Noise | None, position: int, draw: int = 0) -> int:
    return int((logits if noise is None else noise.scores(logits, position, draw)).argmax())


@dataclass
class PlainBlocks:
    """Tokens of a row, with the content of `BlockTrace` for every block."""

    token_ids: list[int] = field(default_factory=list)
    xt: list[list[list[int]]] = field(default_factory=list)
    t: list[list[float]] = field(default_factory=list)


def plain_ar(model: TwoTowerModel, prompt: list[int], max_new_tokens: int, noise: Noise | None = None) -> list[int]:
    tower, memory, row = PlainTower(model, "context_tower"), Memory(), list(prompt)
    tokens = prompt
    for _ in range(max_new_tokens):
        row.append(pick(tower.run(tokens, memory, t=None, causal=True)[-1], noise, len(row)))
        tokens = row[-1:]
    return row[len(prompt) :]


def plain_mock_ar(
    model: TwoTowerModel, prompt: list[int], max_new_tokens: int, noise: Noise | None = None
) -> list[int]:
    context, denoiser = PlainTower(model, "context_tower"), PlainTower(model, "denoiser_tower")
    memory, row = Memory(), list(prompt)
    if row[:-1]:
        context.run(row[:-1], memory, t=None, causal=True)
    for _ in range(max_new_tokens):
        last = row[-1:]
        row.append(pick(denoiser.run(last, copy.deepcopy(memory), t=None, causal=True)[-1], noise, len(row)))
        context.run(last, memory, t=None, causal=True)
    return row[len(prompt) :]


def plain_mask_diffusion(
    model: TwoTowerModel,
    prompt: list[int],
    num_blocks: int,
    block_size: int,
    steps: int,
    threshold: float,
    noise: Noise | None = None,
) -> PlainBlocks:
    context, denoiser = PlainTower(model, "context_tower"), PlainTower(model, "denoiser_tower")
    mask, memory, result = model.config.mask_token_id, Memory(), PlainBlocks()
    context.run(prompt, memory, t=None, causal=True)
    for _ in range(num_blocks):
        block = [mask] * block_size
        xt, times = [list(block)], []
        for step in range(steps):
            masked = [i for i, token in enumerate(block) if token == mask]
            if not masked:
                break
            times.append(len(masked) / block_size)
            logits = denoiser.run(block, copy.deepcopy(memory), t=times[-1], causal=False)
            logits[:, mask] = -math.inf
            probabilities = torch.softmax(logits, -1)
            first = len(prompt) + len(result.token_ids)
            picks = {i: pick(logits[i], noise, first + i, step) for i in masked}
            confidence = {i: float(probabilities[i][picks[i]]) for i in masked}
            above = sum(value > threshold for value in confidence.values())
            quota = min(len(masked), max(1, above, math.ceil(len(masked) / (steps - step))))
            for i in sorted(masked, key=lambda i: (confidence[i], i), reverse=True)[:quota]:
                block[i] = picks[i]
            xt.append(list(block))
        result.token_ids.extend(block)
        result.xt.append(xt)
        result.t.append(times)
        context.run(block, memory, t=None, causal=True)
    return result
