"""Short run: the verifier writes a few texts, and drafts of them are judged beside a healthy drafter's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from twotower_spec.cache_shape import dtype_of
from twotower_spec.checkpoint import encode_texts, end_token_ids, resolve_checkpoint
from twotower_spec.demo.trio import CATEGORIES, held_out_prompts, trio_directory
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.files import weight_files
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.drafting import FixedPolicy, speculative_loop
from twotower_spec.errors import CheckpointError, first_line
from twotower_spec.generation import GenerationOptions, Mode
from twotower_spec.inspection import num_token_ids
from twotower_spec.model import TwoTowerModel
from twotower_spec.printable import byte_text
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE
from twotower_spec.state.transfer import moved

if TYPE_CHECKING:  # imports transformers' models, which take seconds
    from transformers import PreTrainedModel

    from twotower_spec.training.quality import Drafter, VerifierText

PROMPTS_PER_CATEGORY, NEW_TOKENS, LONGEST_PROMPT = 3, 40, 512
POLICY = FixedPolicy(8, 1, num_tokens=7)
# Measured for the bundled trio on all held-out prompts, by `twotower-spec train evaluate`; its policy is the one here.
YARDSTICK = "TwoTower, 1 step, first token from context"
# Bytes of both models up to which nobody needs to ask for the run, where a CPU computes.
SMALL = 4 << 30
# What separates drafters that work from those that do not; a healthy one is far above on every kind of text.
LEAST_FIRST, LEAST_LATER, LEAST_LENGTH, LEAST_PER_PASS, MOST_REPEATED = 0.5, 0.35, 1.5, 1.1, 0.3
# Tokens a round below which drafts are worth nothing: 1 is the verifier's own.
WORTHLESS_LENGTH = 1.05

note = partial(Finding, "short run")


class _VerifierError(Exception):
    """Weights of the verifier that cannot be loaded, or that make no text."""


def examine(case: Case) -> Iterator[Finding]:
    """Runs both models, where they are small or it was asked for."""
    sizes = _sizes(case)
    unknown = next((holder for holder, size in sizes if size is None), "")
    together = sum(size or 0 for _, size in sizes)
    if case.run is False or (case.run is None and (unknown or together > SMALL)):
        reason = f"the {unknown}'s size is not known" if unknown else f"both models take {byte_text(together)}"
        reason = "left out with --no-run" if case.run is False else reason
        yield note("both models", "skipped", reason, "--run, on a machine that holds both")
        return
    own = case.verifier_tokenizer
    # A server reads prompts with the verifier's.
    tokenizer = own.tokenizer or case.tokenizer
    if tokenizer is None:
        yield note("both models", "skipped", f"prompts are text, and {own.reason}")
        return
    prompts = _prompts(case, tokenizer)
    if not prompts:
        yield note("both models", "skipped", f"no prompt is made of the drafter's {case.config.vocab_size} ids alone")
        return
    device = torch.device(case.devices[1])
    towers = TwoTowerModel.from_pretrained(
        case.directory,
        dtype=torch.float32 if device.type == "cpu" else None,
        context_device=device,
        denoiser_device=case.devices[2],
        experts_dtype=case.experts_dtype,
        progress=False,
    )
    try:
        texts = _texts(case, towers, tokenizer, prompts)
    except _VerifierError as error:
        yield note("verifier", "fault", str(error), "download it again, with the config.json of its weights")
        return
    # Anything may be raised: vLLM serves models that transformers cannot load or run, or not in this memory.
    except Exception as error:
        detail = f"the verifier does not run outside of vLLM ({type(error).__name__}: {first_line(error)})"
        yield note("both models", "skipped", detail, "`twotower-spec bench acceptance` measures it in vLLM")
        return
    if sum(len(text.text) for text in texts) < len(texts) * 2:
        detail = "the verifier ends its texts at once: it was made for other prompts than plain text"
        yield note("both models", "skipped", detail, "`twotower-spec bench acceptance` takes prompts of your own")
        return
    yield from _acceptance(towers, texts)
    yield _tokens_per_pass(towers, [text.prompt for text in texts])


def _sizes(case: Case) -> list[tuple[str, int | None]]:
    """Holders and bytes of all weights that the run loads, whatever ranks share; on a CPU they become float32."""
    widening = max(1, torch.float32.itemsize // dtype_of(case.verifier_config).itemsize)
    devices, ranks = case.devices, case.tensor_parallel_size
    # By name of the line: the device that decides the dtype, and how many lines there are of it.
    held = {"weights": (devices[0], ranks), "context tower": (devices[1], 1), "denoiser tower": (devices[1], 1)}
    sizes: list[tuple[str, int | None]] = []
    for line in case.memory.lines:
        if line.name in held:
            device, count = held[line.name]
            count *= widening if torch.device(device).type == "cpu" else 1
            sizes.append((line.holder, None if line.total is None else line.total * count))
    return sizes


def _prompts(case: Case, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts that both models can read."""
    chosen = [
        row.prompt for category in CATEGORIES for row in held_out_prompts(category)[:: 72 // PROMPTS_PER_CATEGORY]
    ]
    prompts = [ids[:LONGEST_PROMPT] for ids in encode_texts(tokenizer, chosen)]
    num_ids = min(case.config.vocab_size, num_token_ids(str(case.verifier)))
    return [ids for ids in prompts if max(ids) < num_ids]


def _texts(
    case: Case, towers: TwoTowerModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> list[VerifierText]:
    """Greedy texts of the verifier, which is run by transformers, or by us where it is a TwoTower checkpoint.

    Raises:
        _VerifierError: its weights cannot be loaded, or its logits are not finite.
    """
    from twotower_spec.training.quality import VerifierText

    directory = resolve_checkpoint(str(case.verifier))
    ends = end_token_ids(directory, tokenizer, num_token_ids(directory))
    try:
        verifier = _loaded(case, towers, directory)
    # Anything may be raised, as above.
    except Exception as error:
        reason = _fault_of_weights(error, directory, "quantization_config" in case.verifier_config)
        if reason:
            raise _VerifierError(f"the verifier's weights cannot be loaded ({reason})") from error
        raise
    if not all(_are_finite(verifier, prompt) for prompt in prompts):
        raise _VerifierError("the verifier's logits are not finite: its weights are damaged, and it writes no text")
    if isinstance(verifier, TwoTowerModel):
        options = GenerationOptions(Mode.AR, max_new_tokens=NEW_TOKENS, eos_token_id=ends)
        written = verifier.generate(prompts, options).token_ids
    else:
        written = speculative_loop(verifier, None, prompts, NEW_TOKENS, eos_token_id=ends).token_ids
    return [VerifierText(prompt, text) for prompt, text in zip(prompts, written, strict=True)]


def _loaded(case: Case, towers: TwoTowerModel, directory: Path) -> TwoTowerModel | PreTrainedModel:
    from twotower_spec.training.stages import load_verifier

    if case.drafts_for_itself:
        is_loaded = directory.samefile(case.directory) and case.experts_dtype is None
        options: dict[str, Any] = {"towers": "context", "context_device": case.devices[0], "progress": False}
        return towers if is_loaded else TwoTowerModel.from_pretrained(directory, **options)
    device = torch.device(case.devices[0])
    return load_verifier(directory, device, torch.float32 if device.type == "cpu" else dtype_of(case.verifier_config))


def _fault_of_weights(error: Exception, directory: Path, is_quantised: bool) -> str:
    """Says what is wrong with the weights; "" where a load failed for another reason."""
    if any(isinstance(one, SafetensorError | CheckpointError) for one in (error, error.__cause__)):
        return first_line(error).partition("; ")[0]
    # transformers may keep quantised tensors in other shapes than vLLM does.
    if not is_quantised and ("size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error)):
        return "tensors have other shapes than config.json makes them"
    try:
        weight_files(directory)
    except CheckpointError as missing:
        return str(missing).partition("; ")[0]
    return ""


@torch.inference_mode()
def _are_finite(verifier: TwoTowerModel | PreTrainedModel, prompt: list[int]) -> bool:
    """Whether the token after a prompt can be chosen; ids that a model never writes may have minus infinity."""
    if isinstance(verifier, TwoTowerModel):
        pages = -(-len(prompt) // DEFAULT_PAGE_SIZE)
        state = ContextState(verifier.config, 1, pages, verifier.dtype, verifier.context.device)
        logits = state.extend_in_chunks(verifier.context, {0: prompt})[0]
    else:
        logits = verifier(input_ids=moved(torch.tensor([prompt]), verifier.device)).logits
    return bool(logits.amax(-1).isfinite().all())


class _Recorded:
    """Drafter whose drafts are kept."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.drafts: list[list[int]] = []

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """See `Drafter.draft`."""
        found = self._drafter.draft(rows, num_tokens)
        self.drafts += found.values()
        return found


def _acceptance(towers: TwoTowerModel, texts: Sequence[VerifierText]) -> Iterator[Finding]:
    from twotower_spec.training.quality import TowerDrafter, measure_acceptance

    num_drafts, longest = POLICY.num_speculative_tokens, max(len(text.token_ids) for text in texts) + 16
    drafter = _Recorded(TowerDrafter(towers, len(texts), longest, POLICY, "context"))
    found = measure_acceptance(drafter, texts, num_drafts)
    healthy = _healthy()
    of = f"of {sum(found.verify_steps)} rounds over {len(texts)} texts"
    first, later = found.by_position[0], _kept(found.by_position)
    detail = f"the context tower's first token is the verifier's in {first:.2f} {of}; bundled trio: {healthy[0]:.2f}"
    remedy = "take a drafter whose context tower is of the verifier's family: `twotower-spec train all --verifier DIR`"
    yield note("first token", "warning", detail, remedy).unless(first >= LEAST_FIRST)
    detail = f"{_figures(found.by_position)} {of}; bundled trio {_figures(healthy)}"
    detail += f"; a position keeps {later:.2f} of what the one before had, the trio {_kept(healthy):.2f}"
    remedy = (
        "compare mask_token_id, block size and dtype with the model card; `twotower-spec bench acceptance` has more"
    )
    yield note("acceptance by position", "warning", detail, remedy).unless(later >= LEAST_LATER)
    detail = f"{found.length:.2f} tokens a round, the verifier's own included; bundled trio {1 + sum(healthy):.2f}"
    if found.length < WORTHLESS_LENGTH:
        detail = f"the drafts are worth nothing: {detail}"
        remedy = "take another drafter, one that was trained for this verifier: `twotower-spec train all` makes one"
        yield note("tokens per round", "fault", detail, remedy)
    else:
        remedy = "it is near 1, where drafting costs and brings little: look at the two lines above"
        yield note("tokens per round", "warning", detail, remedy).unless(found.length >= LEAST_LENGTH)
    repeated, usual = _repeated(drafter.drafts), _repeated([text.text for text in texts])
    detail = f"{repeated:.2f} of the drafts repeat the token before them, {usual:.2f} of the verifier's tokens do"
    remedy = "a block of one token is drafted without its context: compare config.json with that of the training"
    yield note("repetition", "warning", detail, remedy).unless(repeated <= usual + MOST_REPEATED)


def _tokens_per_pass(towers: TwoTowerModel, prompts: list[list[int]]) -> Finding:
    """Generates with the drafter alone: a denoiser that is never sure commits one token a pass."""
    options = GenerationOptions(Mode.MASK_DIFFUSION, max_new_tokens=32, block_size=16)
    found = towers.generate(prompts, options).tokens_per_denoiser_pass or 0.0
    detail = (
        f"{found:.2f} tokens a pass of mask diffusion, blocks of 16, committed above {options.confidence_threshold}"
    )
    remedy = "it is stuck at 1, sure of nothing, as before training: take other weights, or policy fixed with one step"
    return note("tokens per pass", "warning", detail, remedy).unless(found >= LEAST_PER_PASS)


def _healthy() -> list[float]:
    """Acceptance by position of the bundled trio, over four kinds of text."""
    rows = json.loads((trio_directory() / "evaluation.json").read_text())["rows"]
    wanted = [row["by_position"] for row in rows if row["system"] == YARDSTICK and row["temperature"] == 0]
    return [float(share) for share in np.mean(wanted, axis=0)]


def _kept(by_position: Sequence[float]) -> float:
    """Share that a position keeps, on average, of what was accepted at the one before."""
    before = sum(first for first, _ in pairwise(by_position))
    return sum(by_position[1:]) / before if before else 0.0


def _repeated(rows: Sequence[Sequence[int]]) -> float:
    pairs = [first == second for row in rows for first, second in pairwise(row)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def _figures(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)
