"""Weights: numbers that are none, towers and heads that hold each other's weights, and time that nothing depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from twotower_spec.checkpoint.quantised import is_quantised
from twotower_spec.checkpoint.shards import read_in_place
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.diagnosis.sample import Sample
from twotower_spec.towers.time_conditioning import TimeConditioning

AGAIN = "download the checkpoint again, or save it again from the training that made it"
SHOWN_NAMES = 3
# Rows of a matrix that may be zeros: reserved tokens have such rows.
MOST_ZERO_ROWS = 0.25
# Bytes of tensors that are compared in all layers where only some of these are in memory.
SMALL_TENSOR = 1 << 20
TOWERS = ("denoiser_tower.", "context_tower.")
# Modulation that is smaller than this, or changes less with time, is none.
NOTHING = 1e-6

note = partial(Finding, "weights")


def examine(case: Case) -> Iterator[Finding]:
    """Looks at the stored numbers, then at both towers side by side, and at the time conditioning."""
    sample = case.sample
    yield from _numbers(case, sample)
    yield from _towers(case, sample)
    yield _time(sample.towers.denoiser.time_conditioning)


@torch.inference_mode()
def _numbers(case: Case, sample: Sample) -> Iterator[Finding]:
    wanted = {name: stored for name, stored in case.index.items() if name in sample.names}
    bad, empty = list[str](), list[str]()
    for piece, values in read_in_place(wanted):
        if is_quantised(values.dtype):
            continue
        if not values.isfinite().all():
            bad.append(piece.name)
        elif values.dim() > 1 and _share_of_zero_rows(values) >= MOST_ZERO_ROWS:
            empty.append(piece.name)
    looked_at = "all tensors" if sample.is_whole else f"tensors of layers {', '.join(map(str, sample.layers))}"
    if bad:
        yield note("numbers", "fault", f"NaN or infinity in {_shown(bad)}", AGAIN)
    if empty:
        detail = f"{MOST_ZERO_ROWS:.0%} or more of the rows of {_shown(empty)} are zeros, as after a broken download"
        yield note("numbers", "warning", detail, AGAIN)
    if not bad and not empty:
        yield note("numbers", "ok", f"{looked_at}: {len(wanted)}, all finite, none empty")


def _share_of_zero_rows(values: Tensor) -> float:
    rows = values.flatten(end_dim=-2).any(-1)
    return 1 - float(rows.double().mean())


def _towers(case: Case, sample: Sample) -> Iterator[Finding]:
    context, denoiser = sample.towers.context, sample.towers.denoiser
    own = dict(denoiser.checkpoint_tensors())
    others = {name.replace("context", "denoiser", 1): tensor for name, tensor in context.checkpoint_tensors()}
    layers = [name for name in others if ".layers." in name]
    same = [name for name in layers if _equal(own[name], others[name])]
    if len(same) < len(layers):
        yield note("towers", "ok", f"{len(same)} of {len(layers)} tensors of their layers are the same in both")
    elif not sample.is_whole and not _small_tensors_are_equal(case):
        numbers = ", ".join(map(str, sample.layers))
        yield note("towers", "ok", f"layers {numbers} are the same in both, of the others some are not")
    else:
        detail = "every layer of the denoiser is the context tower's: it was never trained, or has been overwritten"
        yield note("towers", "fault", detail, AGAIN)
    embeddings = {"context tower": context.embeddings, "denoiser": denoiser.embeddings}
    heads = {"context tower": context.head, "denoiser": denoiser.head}
    shared = [f"the {name}'s head is its embedding table" for name in heads if _equal(heads[name], embeddings[name])]
    if _equal(*heads.values()):
        shared.append("the denoiser's lm_head is the context tower's context_lm_head")
    if shared:
        remedy = f"if the training did not hold them together, one has overwritten the other: {AGAIN}"
        yield note("heads", "warning", f"{'; '.join(shared)}, to the bit", remedy)
    else:
        tables = "the same" if _equal(*embeddings.values()) else "two"
        yield note("heads", "ok", f"two heads, neither an embedding table; embedding tables: {tables}")


@torch.inference_mode()
def _small_tensors_are_equal(case: Case) -> bool:
    """Whether both towers hold the same in all small tensors of all layers, those that are in no sample among them."""
    for name, stored in case.index.items():
        other = name.replace(*TOWERS, 1)
        if other != name and other in case.index and ".layers." in name and stored.nbytes <= SMALL_TENSOR:
            own, others = (
                values.clone() for one in (name, other) for _, values in read_in_place({one: case.index[one]})
            )
            if not torch.equal(own, others):
                return False
    return True


@torch.inference_mode()
def _time(conditioning: TimeConditioning) -> Finding:
    """Looks at modulation at a block of masked positions, and at its end."""
    times = torch.tensor([1.0, 1 / 16]).to(conditioning.b1.device)
    shift, scale, gate = conditioning.shift_scale_gate(times).double().unbind(2)
    change = float((shift[0] - shift[1]).abs().max() + (scale[0] - scale[1]).abs().max())
    sizes = f"gates {float(gate.abs().mean()):.2g}, scales {float(scale.abs().mean()):.2g} on average"
    if float(gate.abs().max()) < NOTHING:
        detail = f"all gates are 0, so that the denoiser's layers add nothing ({sizes})"
        return note("time conditioning", "fault", detail, AGAIN)
    if change < NOTHING:
        detail = f"shift and scale are the same whatever number of positions is masked ({sizes})"
        return note("time conditioning", "warning", detail, f"t_embedder, t_block: {AGAIN}")
    return note("time conditioning", "ok", f"{sizes}; they change by up to {change:.2g} with time")


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.to(second.device), second)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
