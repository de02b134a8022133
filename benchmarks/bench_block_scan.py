"""A block of Mamba-2 tokens from a seeded state beside the recurrence in PyTorch, and beside mamba-ssm's scan."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import MID_SIZE, REAL_SIZE
from twotower_kernels.block_scan import ScanWeights, block_scan, mamba_ssm_scan, replay_scan, scan_with
from twotower_spec import TwoTowerConfig

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, ScanWeights]
States = tuple[Tensor | None, Tensor | None]

DTYPE = torch.bfloat16
# Two roundings per number, of the convolution and of a rival's factors; in the mean over all numbers.
TOLERANCE = 2**-6


def cases(device: torch.device) -> list[Case]:
    """One layer's drafts of a block, extensions by accepted tokens, single tokens, and prefills."""
    if device.type != "cuda":
        return [_scan(device, MID_SIZE, 1, num_tokens, state) for num_tokens, state in ((1, True), (16, False))] + [
            _replay(device, MID_SIZE, 1, 17)
        ]
    passes = ((1, True), (16, False), (17, True))
    blocks = [_scan(device, REAL_SIZE, num_reqs, *how) for how in passes for num_reqs in (1, 8, 64)]
    prefills = [_scan(device, REAL_SIZE, 1, num_tokens, True) for num_tokens in (256, 512, 2048)]
    return blocks + prefills + [_replay(device, REAL_SIZE, num_reqs, 17) for num_reqs in (1, 8)]


def _scan(device: torch.device, config: TwoTowerConfig, num_reqs: int, num_tokens: int, return_state: bool) -> Case:
    def make() -> Systems:
        case = inputs(device, config, num_reqs, num_tokens)
        functions: dict[str, Callable[[], tuple[Tensor, *States]]] = {
            OURS: lambda: block_scan(*case, return_state=return_state),
            "torch composition": lambda: composition(*case, None),
        }
        if device.type == "cuda" and num_tokens <= 32:
            compiled = torch.compile(composition, dynamic=False)
            functions["torch.compile"] = lambda: compiled(*case, None)
        if device.type == "cuda" and find_spec("mamba_ssm") is not None:
            library = mamba_ssm_scan()
            functions["mamba-ssm"] = lambda: scan_with(library, *case, None)
        _agree([function() for function in functions.values()])
        return dict(functions)

    return _case(config, "block_scan", num_reqs, num_tokens, output=True, state=return_state, make=make)


def _replay(device: torch.device, config: TwoTowerConfig, num_reqs: int, num_tokens: int) -> Case:
    def make() -> Systems:
        case = inputs(device, config, num_reqs, num_tokens)
        accepted = torch.arange(num_reqs, device=device) % num_tokens + num_tokens // 2
        accepted = accepted.clamp(max=num_tokens)
        functions: dict[str, Callable[[], States]] = {
            OURS: lambda: replay_scan(*case, accepted),
            "torch composition": lambda: composition(*case, accepted)[1:],
        }
        _agree([function() for function in functions.values()])
        return dict(functions)

    return _case(config, "replay_scan", num_reqs, num_tokens, output=False, state=True, make=make)


def _agree(results: list[tuple[Tensor | None, ...]]) -> None:
    for result in results:
        for actual, expected in zip(result, results[1], strict=True):
            if actual is not None and expected is not None:
                assert (actual - expected).norm() <= TOLERANCE * expected.norm()


def _case(
    config: TwoTowerConfig,
    op: str,
    num_reqs: int,
    num_tokens: int,
    output: bool,
    state: bool,
    make: Callable[[], Systems],
) -> Case:
    heads, channels = config.mamba_num_heads, config.d_conv_channels
    state_bytes = 4 * config.d_inner * config.ssm_state_size + DTYPE.itemsize * channels * (config.conv_kernel - 1)
    token_bytes = DTYPE.itemsize * (channels + heads) + 4 * config.d_inner * output
    weight_bytes = DTYPE.itemsize * channels * (config.conv_kernel + 1) + 3 * 4 * heads
    moved = num_reqs * (state_bytes * (1 + state) + num_tokens * token_bytes) + weight_bytes
    with_state = ", state returned" if output and state else ""
    shape = f"{op} [{num_reqs}, {num_tokens}], {heads} heads{with_state}, bf16"
    return Case("block_scan", "scan_16" if num_tokens <= 16 else "scan_32", shape, moved, make)


def inputs(device: torch.device, config: TwoTowerConfig, num_reqs: int, num_tokens: int) -> Inputs:
    """Makes inputs as a layer does: parts of one projection, and states of slots in a pool."""
    generator = torch.Generator(device).manual_seed(0)
    channels, heads = config.d_conv_channels, config.mamba_num_heads

    def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    _, u, delta = randn(num_reqs, num_tokens, config.d_inner + channels + heads).split(
        [config.d_inner, channels, heads], dim=-1
    )
    weights = ScanWeights(
        conv_weight=0.5 * randn(config.conv_kernel, channels).t(),
        conv_bias=0.1 * randn(channels),
        a_log=randn(heads, dtype=torch.float32),
        d=randn(heads, dtype=torch.float32),
        dt_bias=randn(heads, dtype=torch.float32) - 4,
        num_groups=config.n_groups,
    )
    conv = randn(num_reqs + 1, config.conv_kernel - 1, channels)[1:]
    ssm = randn(num_reqs + 1, heads, config.mamba_head_dim, config.ssm_state_size, dtype=torch.float32)[1:]
    return u, delta, conv, ssm, weights


def composition(
    u: Tensor, delta: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: ScanWeights, num_accepted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the recurrence in float32, token by token, as the published code does without its kernels."""
    heads, head_dim, state_size = ssm_state.shape[1:]
    num_tokens, groups, history = u.shape[1], weights.num_groups, conv_state.shape[1]
    window = torch.cat([conv_state, u], dim=1)
    mixed = F.conv1d(
        window.transpose(1, 2), weights.conv_weight[:, None], weights.conv_bias, groups=u.shape[2]
    ).transpose(1, 2)
    x, bc = F.silu(mixed).float().split([heads * head_dim, 2 * groups * state_size], dim=-1)
    x = x.unflatten(-1, (heads, head_dim))
    b, c = bc.unflatten(-1, (2, groups, state_size)).repeat_interleave(heads // groups, dim=3).unbind(2)
    step = F.softplus(delta.float() + weights.dt_bias)
    if num_accepted is not None:
        step = step * (torch.arange(num_tokens, device=u.device) < num_accepted[:, None])[..., None]
    decay = torch.exp(step * -torch.exp(weights.a_log))
    state, outputs = ssm_state, []
    for t in range(num_tokens):
        state = decay[:, t, :, None, None] * state + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((state @ c[:, t, ..., None])[..., 0] + weights.d[:, None] * x[:, t])
    y = torch.stack(outputs, dim=1).flatten(2)
    if num_accepted is None:
        return y, window[:, num_tokens:], state
    kept = num_accepted[:, None] + torch.arange(history, device=u.device)
    return y, window.gather(1, kept[..., None].expand(-1, -1, u.shape[2])), state


@one_by_one(cases(torch.device("cpu")))
def test_block_scan(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
