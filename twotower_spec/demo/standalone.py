"""The bundled TwoTower model on its own: every mode on held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import end_token_ids, load_tokenizer
from twotower_spec.demo.trio import HeldOutPrompt, held_out_prompts, trio_path
from twotower_spec.generation import GenerationOptions, Mode
from twotower_spec.model import TwoTowerModel


@dataclass(frozen=True)
class DemoText:
    """Text that one mode wrote for one prompt.

    Attributes:
        mode: name of the mode.
        prompt: what it continues.
        text: new text, up to the end of the document.
        num_tokens: new tokens, those after the end in a last block included.
        num_denoiser_passes: denoiser passes (NFE); 0 for AR.
        num_context_passes: context passes, the prompt counted as one.
        seconds: all phases together.
    """

    mode: str
    prompt: HeldOutPrompt
    text: str
    num_tokens: int
    num_denoiser_passes: int
    num_context_passes: int
    seconds: float


def demo_prompts(per_category: int) -> list[HeldOutPrompt]:
    """Chooses prompts of both generated categories, each a different kind of held-out prompt."""
    chosen: list[HeldOutPrompt] = []
    for category in ("maths", "python"):
        rows = held_out_prompts(category)
        chosen.extend(rows[i * len(rows) // per_category] for i in range(per_category))
    return chosen


def run_modes(prompts: list[HeldOutPrompt], max_new_tokens: int) -> Iterator[DemoText]:
    """Generates every prompt in every mode, one at a time, in float32."""
    path = trio_path("twotower")
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    towers = TwoTowerModel.from_pretrained(path, dtype=torch.float32, progress=False)
    eos = end_token_ids(path, tokenizer, towers.config.vocab_size)
    for prompt in prompts:
        ids = list(tokenizer(prompt.prompt)["input_ids"])
        for mode in Mode:
            result = towers.generate([ids], GenerationOptions(mode, max_new_tokens=max_new_tokens, eos_token_id=eos))
            tokens = result.token_ids[0]
            yield DemoText(
                mode=mode.value,
                prompt=prompt,
                text=_until_end(tokens, tokenizer, eos),
                num_tokens=len(tokens),
                num_denoiser_passes=result.num_denoiser_passes[0],
                num_context_passes=result.num_context_passes[0],
                seconds=result.times.total_s,
            )


def _until_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase, eos: list[int]) -> str:
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
