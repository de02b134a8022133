"""Sampling of the verifier's own text for distillation and measuring: batched, with counter-based noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from transformers import DynamicCache

from twotower_spec.checkpoint import end_token_ids
from twotower_spec.generation.sampling import Sampler
from twotower_spec.terminal import Terminal
from twotower_spec.training.corpus import training_documents
from twotower_spec.training.recipe import SamplingConfig
from twotower_spec.training.workspace import Workspace

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel

# Beginnings are drawn with another seed than the corpus.
FRESH_SEED = 1_000_003
# Finished rows are removed when at most this share of a batch still runs; each removal copies the cache.
MOST_RUNNING = 0.75


@torch.inference_mode()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    eos_token_ids: Sequence[int],
    seeds: Sequence[int],
) -> list[list[int]]:
    """Continues prompts of any lengths in one batch.

    Args:
        model: a causal language model of transformers.
        prompts: token ids; at least one each.
        max_new_tokens: most new tokens per prompt.
        sampler: greedy, or with temperature and filters.
        eos_token_ids: ids that end a row; they are kept.
        seeds: of the noise, one per prompt.

    Returns:
        New token ids per prompt.
    """
    device = model.device
    width = max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= padding[:, None]).long()
    row_seeds = torch.tensor(seeds, device=device)
    positions = (torch.arange(width, device=device) - padding[:, None]).clamp(min=0)
    cache = DynamicCache(config=model.config)
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    finished: set[int] = set()
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = sampler.sample(out.logits[:, -1].float(), row_seeds, positions[:, -1] + 1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in finished:
                new[row].append(token)
                if token in eos_token_ids:
                    finished.add(row)
        if len(finished) == len(prompts):
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        running = [i for i, row in enumerate(rows) if row not in finished]
        if len(running) <= MOST_RUNNING * len(rows):
            kept = torch.tensor(running, device=device)
            cache.batch_select_indices(kept)
            ids, positions, mask, row_seeds = ids[kept], positions[kept], mask[kept], row_seeds[kept]
            rows = [rows[i] for i in running]
    return new


def sample_continuations(workspace: Workspace, model: PreTrainedModel, config: SamplingConfig) -> Iterator[list[int]]:
    """Makes documents that begin with text of the corpus and are continued by the verifier.

    A share of them is greedy, the rest sampled at the configured temperature.
    """
    prompts: list[list[int]] = []
    for source, count in workspace.sample_counts().items():
        prompts.extend(beginnings(workspace, source, count, config.prompt_tokens))
    # Rows of one batch have similar lengths; which ones are greedy does not depend on the length.
    greedy = [i % 100 < 100 * config.greedy for i in range(len(prompts))]
    eos = end_token_ids(workspace.verifier, workspace.tokenizer(), workspace.vocab_size())
    batches: list[tuple[list[int], Sampler]] = []
    for wanted, sampler in ((True, Sampler()), (False, Sampler(config.temperature))):
        rows = sorted((i for i in range(len(prompts)) if greedy[i] == wanted), key=lambda i: len(prompts[i]))
        batches += [(rows[i : i + config.batch_size], sampler) for i in range(0, len(rows), config.batch_size)]
    done: dict[int, list[int]] = {}
    shown = Terminal(stderr=True)
    for rows, sampler in track(batches, description="sampling", console=shown, disable=parent_process() is not None):
        new = continue_prompts(model, [prompts[i] for i in rows], config.max_new_tokens, sampler, eos, rows)
        done |= {i: prompts[i] + tokens for i, tokens in zip(rows, new, strict=True)}
    for i in range(len(prompts)):
        yield done[i]


def beginnings(workspace: Workspace, source: str, count: int, prompt_tokens: int) -> list[list[int]]:
    """Token ids of beginnings: prompts of fresh generated documents, or excerpts of real text."""
    tokenizer = workspace.tokenizer()
    if source in ("maths", "python"):
        fresh = training_documents(source, count, workspace.recipe.seed + FRESH_SEED)
        prompts: list[list[int]] = tokenizer([document.prompt for document in fresh])["input_ids"]
        return prompts
    if source == "gsm8k":
        questions = [text[: text.index("\nAnswer:") + len("\nAnswer:")] for text in workspace.documents(source)]
        prompts = tokenizer(questions)["input_ids"]
        return prompts[:count]
    stream = workspace.stream(source)
    generator = torch.Generator().manual_seed(workspace.recipe.seed + FRESH_SEED)
    chosen = torch.randint(len(stream.starts), (count,), generator=generator).tolist()
    starts: list[int] = stream.starts[chosen].tolist()
    return [stream.tokens[start : start + prompt_tokens].astype("int64").tolist() for start in starts]
