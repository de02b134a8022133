"""Choice of the scan for long prefills on a GPU: the first of mamba-ssm, registered scans and ours that is right."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.block_scan.chunked import last_inputs, scan_inputs
from twotower_kernels.block_scan.reference import block_scan_reference
from twotower_kernels.block_scan.types import ScanWeights

logger = logging.getLogger(__name__)

# Tokens per chunk of the candidates: what their authors use for a state of 128; they require a power of two.
CHUNK = 128
# Largest error of a token's output or a head's state, relative to its norm. Candidates round the state between chunks
# to the model's dtype; one that multiplies float32 in TF32 is off by 1e-3, too much for a float32 model.
TOLERANCE, FLOAT32_TOLERANCE = 2e-2, 1e-4


class LongScan(Protocol):
    """The recurrence of whole sequences, without the convolution before it."""

    def __call__(
        self, x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, ssm_state: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """Output, shaped like x, and the state after the last token.

        Args:
            x: [num_reqs, num_tokens, heads, head_dim], in the model's dtype.
            step: float32 [num_reqs, num_tokens, heads], after softplus; 0 for padding.
            a: float32 [heads], negative.
            b, c: [num_reqs, num_tokens, groups, state_size], in the model's dtype.
            d: float32 [heads].
            ssm_state: float32 [num_reqs, heads, head_dim, state_size], before the first token. Not modified.
        """
        ...


def mamba_ssm_scan() -> LongScan:
    """Wraps mamba-ssm's chunk scan; ImportError where it is not installed."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan(
        x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, state = mamba_chunk_scan_combined(
            x, step, a, b, c, CHUNK, D=d, initial_states=ssm_state, return_final_states=True
        )
        return y, state

    return scan


# Loaded and tried in this order.
_loaders: dict[str, Callable[[], LongScan]] = {"mamba-ssm": mamba_ssm_scan}


@dataclass(frozen=True)
class _Place:
    """Device, dtype and sizes for which a candidate is right or wrong."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    state_size: int


_chosen: dict[_Place, LongScan | None] = {}


def register_long_scan(name: str, load: Callable[[], LongScan]) -> None:
    """Adds a candidate after those already there; every choice made so far is made again.

    Args:
        name: for the log; a second one of the same name takes the first one's place.
        load: imports and wraps it, when a long scan first needs one. Anything it raises refuses the candidate.
    """
    _loaders[name] = load
    _chosen.clear()


def varlen_scan(combined: Callable[..., Tensor]) -> LongScan:
    """Wraps vLLM's `mamba_chunk_scan_combined_varlen`, which takes the tokens of all requests in one row.

    Source: vllm/model_executor/layers/mamba/ops/ssd_combined.py; a chunk must not reach into the next request.
    """

    def scan(
        x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_reqs, num_tokens = x.shape[:2]
        num_chunks = -(-num_tokens // CHUNK)
        requests = torch.arange(num_reqs + 1, device=x.device, dtype=torch.int32)
        ends = (torch.arange(1, num_chunks + 1, device=x.device, dtype=torch.int32) * CHUNK).clamp(max=num_tokens)
        y = x.new_empty(x.flatten(0, 1).shape)
        state = combined(
            x.flatten(0, 1),
            step.flatten(0, 1),
            a,
            b.flatten(0, 1),
            c.flatten(0, 1),
            CHUNK,
            cu_seqlens=requests * num_tokens,
            cu_chunk_seqlens=F.pad((requests[:-1, None] * num_tokens + ends).flatten(), (1, 0)),
            last_chunk_indices=requests[1:] * num_chunks - 1,
            seq_idx=requests[:-1].repeat_interleave(num_chunks),
            out=y,
            D=d,
            initial_states=ssm_state,
            state_dtype=ssm_state.dtype,
        )
        return y.view(x.shape), state

    return scan


def choose_long_scan(device: torch.device, dtype: torch.dtype, head_dim: int, state_size: int) -> LongScan | None:
    """The scan for long prefills of a model in `dtype`, or None for our own; chosen on the first call, and logged.

    The first call runs every candidate up to the chosen one and waits for the device: make it before serving.
    """
    place = _Place(device, dtype, head_dim, state_size)
    if place not in _chosen:
        name, _chosen[place] = _choose(place)
        logger.info("long scans on %s in %s are run by %s", device, dtype, name)
    return _chosen[place]


def _choose(place: _Place) -> tuple[str, LongScan | None]:
    for name, load in _loaders.items():
        try:
            scan = load()
        except ImportError as missing:
            logger.info("long scans: %s is not installed (%s)", name, missing)
            continue
        except Exception as fault:
            logger.warning("long scans: %s does not load: %r", name, fault)
            continue
        with torch.cuda.device_of(torch.empty(0, device=place.device)):  # Triton launches on the current device
            fault_found = _fault_of(scan, place)
        if fault_found is None:
            return name, scan
        logger.warning("long scans: %s is refused: %s", name, fault_found)
    return "twotower_kernels", None


def _fault_of(scan: LongScan, place: _Place) -> str | None:
    """Error of a candidate in a sentence, None where it is right.

    It scans several chunks from a state that is not zero; the last chunk is not full and one row is shorter. Several
    versions of the candidates ignored initial states, or decayed them from the wrong token: vLLM pull requests 21783
    and 23279, TensorRT-LLM 6334, and reports on mamba-ssm with the published model.
    """
    u, delta, conv_state, ssm_state, weights, query_lens = _trial(place, torch.device("cpu"))
    expected_y, _, expected_state = block_scan_reference(u, delta, conv_state, ssm_state, weights, query_lens)
    try:
        y, _, state = (t.cpu() for t in scan_with(scan, *_trial(place, place.device)))
    except Exception as fault:
        return f"it raises {fault!r}"
    tolerance = FLOAT32_TOLERANCE if place.dtype == torch.float32 else TOLERANCE
    valid = torch.arange(y.shape[1]) < query_lens[:, None]
    errors = {"output": _error(y[valid], expected_y[valid]), "state": _error(state, expected_state)}
    faults = [f"{what} is off by {error:.1e}" for what, error in errors.items() if not error <= tolerance]
    return f"{' and '.join(faults)}; {tolerance:.0e} is allowed" if faults else None


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest relative error of [token] outputs or [request, head] states; NaN where either has one."""
    wrong, whole = ((t.flatten(-2) if t.dim() > 2 else t).norm(dim=-1) for t in (actual - expected, expected))
    return float((wrong / whole).max())


def _trial(place: _Place, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, ScanWeights, Tensor]:
    """Inputs of `block_scan`, the same on every device; the first state still counts after the last token."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    heads, groups, taps, num_reqs, num_tokens = 4, 2, 4, 2, 2 * CHUNK + 45
    channels = heads * place.head_dim + 2 * groups * place.state_size
    weights = ScanWeights(
        conv_weight=(0.5 * randn(channels, taps)).to(place.dtype),
        conv_bias=(0.1 * randn(channels)).to(place.dtype),
        a_log=0.3 * randn(heads),
        d=randn(heads),
        dt_bias=0.3 * randn(heads) - 5.0,
        num_groups=groups,
    )
    u, delta = randn(num_reqs, num_tokens, channels).to(place.dtype), randn(num_reqs, num_tokens, heads).to(place.dtype)
    conv_state = randn(num_reqs, taps - 1, channels).to(place.dtype)
    ssm_state = randn(num_reqs, heads, place.head_dim, place.state_size)
    return u, delta, conv_state, ssm_state, weights, torch.tensor([num_tokens, CHUNK + 7], device=device)


def scan_with(
    scan: LongScan,
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    query_lens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what `block_scan` returns with states, the recurrence by `scan`."""
    window = torch.cat([conv_state, u], dim=1)
    x, b, c, step = scan_inputs(u, delta, window, ssm_state, weights, query_lens)
    x, b, c = (t.to(u.dtype) for t in (x, b, c))  # they were rounded to it
    y, new_ssm = scan(x, step, -torch.exp(weights.a_log), b, c, weights.d, ssm_state.contiguous())
    return y.to(ssm_state.dtype).flatten(2), last_inputs(window, conv_state.shape[1], query_lens), new_ssm
