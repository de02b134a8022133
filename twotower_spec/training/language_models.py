"""Verifier and AR draft model: Qwen3-style models of transformers, trained on next tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from twotower_spec.training.loop import StepLoss
from twotower_spec.training.recipe import LanguageModelConfig
from twotower_spec.training.tokenizer import MODEL_MAX_LENGTH

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel


def build_language_model(
    model: LanguageModelConfig, vocab_size: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A model with random weights from a private generator, in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        max_position_embeddings=MODEL_MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
        **asdict(model),
    )
    with torch.device("meta"):
        language_model: PreTrainedModel = Qwen3ForCausalLM(config)
    language_model.to_empty(device="cpu")
    _initialise_(language_model, seed)
    return language_model


@torch.no_grad()
def _initialise_(model: PreTrainedModel, seed: int) -> None:
    """Matrices normal with standard deviation 1 / sqrt(inputs), embeddings 0.02, norms one; rotary buffers as built."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)
            continue
        deviation = 0.02 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)


class NextTokenLoss:
    """Mean negative log-likelihood of every next token.

    Args:
        model: gives logits [batch, tokens, vocab] for token ids.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, rows: Tensor, step: int) -> StepLoss:
        """Loss of a batch [batch, tokens + 1]."""
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return StepLoss(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()), {})


def save_language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes model and tokenizer as transformers and vLLM read them, weights in bfloat16."""
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
