"""Targets and drafts small enough to enumerate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tests.support.builders import tiny_model
from twotower_spec import TwoTowerModel
from twotower_spec.drafting.draft_block import DraftBlock, Noise, Provenance
from twotower_spec.generation.denoising import CommitRule, DenoisingStep
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state import ContextState


@cache
def tiny_target(vocab_size: int = 61, seed: int = 0) -> PreTrainedModel:
    """A random Qwen3 in float64."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: PreTrainedModel = Qwen3ForCausalLM(config)
    model.to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 0.35 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(wide if parameter.dim() > 1 else 1 + wide)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def greedy_texts(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, eos: int | None = None) -> list:
    """Texts that `generate` of transformers writes, prompt by prompt."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=eos,
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@torch.no_grad()
def target_probs(model: PreTrainedModel, prompt: list[int], sampler: Sampler, length: int) -> dict[tuple, Tensor]:
    """The target's distribution after the prompt and every text of fewer than `length` tokens."""
    vocab = range(model.config.vocab_size)
    texts = [text for n in range(length) for text in itertools.product(vocab, repeat=n)]
    probs = {}
    for n in range(length):
        same = [text for text in texts if len(text) == n]
        logits = model(torch.tensor([[*prompt, *text] for text in same])).logits[:, -1]
        probs |= dict(zip(same, sampler.probs(logits), strict=True))
    return probs


@dataclass(frozen=True)
class Outcome:
    """Possible draft, with its probability and the distributions that it was drawn from."""

    tokens: tuple[int, ...]
    probability: float
    probs: Tensor
    num_steps: int

    def block(self, noise: Noise) -> DraftBlock:
        count = len(self.tokens)
        return DraftBlock(
            request_ids=(0,),
            block_size=count,
            token_ids=torch.tensor([self.tokens]),
            num_draft_tokens=[count],
            confidence=torch.ones(1, count),
            num_denoiser_passes=[self.num_steps],
            num_context_passes=[1],
            provenance=Provenance(self.num_steps, noise, noise != "none" and self.num_steps == 1),
            probs=self.probs[None],
        )


def tiny_drafting_model(vocab_size: int = 5) -> TwoTowerModel:
    return tiny_model(vocab_size=vocab_size, hybrid_override_pattern="M*E", seed=2)


def draft_outcomes(
    model: TwoTowerModel, prompt: list[int], size: int, rule: CommitRule, sampler: Sampler, first_from_context: bool
) -> Iterator[Outcome]:
    """Enumerates every draft of a real denoiser under a commit rule: all picks of all steps."""
    with torch.inference_mode():
        yield from _draft_outcomes(model, prompt, size, rule, sampler, first_from_context)


def _draft_outcomes(
    model: TwoTowerModel, prompt: list[int], size: int, rule: CommitRule, sampler: Sampler, first_from_context: bool
) -> Iterator[Outcome]:
    state = ContextState(model.config, 1, 8, model.dtype)
    logits = state.extend(model.context, {0: prompt}).logits
    assert logits is not None
    context, mask, vocab = state.block_context([0], size), model.config.mask_token_id, model.config.vocab_size
    blank, nothing = torch.full((1, size), mask), torch.zeros(size, vocab, dtype=torch.float64)

    def walk(block: Tensor, probability: float, probs: Tensor, step: int) -> Iterator[Outcome]:
        masked = block == mask
        if not masked.any():
            yield Outcome(tuple(block[0].tolist()), probability, probs, step)
            return
        modulation = model.denoiser.time_conditioning.for_block_size(size)[masked.sum(1)]
        positions = masked.flatten().nonzero()[:, 0]
        step_logits = model.denoiser(block, context, modulation, positions)
        step_logits[:, mask] = -torch.inf
        own = sampler.probs(step_logits)
        natural = torch.softmax(step_logits, -1)
        for picks in itertools.product(range(vocab), repeat=len(positions)):
            chance = float(own[range(len(picks)), list(picks)].prod())
            if chance == 0:
                continue
            confidence = torch.ones(1, size, dtype=torch.float64)
            confidence[0, positions] = natural[range(len(picks)), list(picks)]
            commits = rule.commits(DenoisingStep(step, [0], masked, confidence))
            picked = block.clone()
            picked[0, positions] = torch.tensor(picks)
            drawn = probs.clone()
            drawn[positions] = torch.where(commits[0, positions][:, None], own, drawn[positions])
            yield from walk(torch.where(commits, picked, block), probability * chance, drawn, step + 1)

    if not first_from_context:
        yield from walk(blank, 1.0, nothing, 0)
        return
    logits[:, mask] = -torch.inf
    first = sampler.probs(logits)[0]
    for token in range(vocab):
        if first[token] > 0:
            block, probs = blank.clone(), nothing.clone()
            block[0, 0], probs[0] = token, first
            yield from walk(block, float(first[token]), probs, 0)
