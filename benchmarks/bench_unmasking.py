"""A denoising step after the logits: picks, confidence and commits, beside PyTorch as people write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import REAL_SIZE
from twotower_kernels.unmasking import PickNoise, Unmasked, pick_tokens, unmask

MASK, THRESHOLD, REMAINING_STEPS, TEMPERATURE = 3, 0.8, 8, 0.8
MODES = ("greedy", "sampled")


def cases(device: torch.device) -> list[Case]:
    """First steps of whole blocks, and first tokens of a batch."""
    if device.type == "cuda":
        vocab, half = REAL_SIZE.vocab_size, torch.bfloat16
        blocks = [(num_reqs, 16, vocab, half) for num_reqs in (1, 8, 64)] + [(8, 16, vocab, torch.float32)]
        tokens = [(8, 1, vocab, half), (64, 1, vocab, half)]
    else:
        blocks = [(1, 8, 2048, torch.float32), (8, 8, 2048, torch.float32), (1, 16, 32000, torch.float32)]
        tokens = [(8, 1, 2048, torch.float32)]
    return [_case(device, mode, *size) for mode in MODES for size in (*blocks, *tokens)]


def _case(device: torch.device, mode: str, num_reqs: int, block_size: int, vocab_size: int, dtype: torch.dtype) -> Case:
    alone = block_size == 1

    def make() -> Systems:
        step = Step(device, mode == "sampled", num_reqs, block_size, vocab_size, dtype)
        ours: Callable[[], object] = step.picks if alone else step.ours
        composition: Callable[[], object] = step.picks_composed if alone else step.composition
        step.check()
        systems = {OURS: ours, "torch composition": composition}
        if device.type == "cuda" and mode == "greedy":
            systems["torch.compile"] = torch.compile(composition, dynamic=False)
        return systems

    name = "pick_tokens" if alone else "unmask"
    return Case(
        op="unmasking",
        kernel=name,
        shape=f"{name} {mode}, {num_reqs} x {block_size} x {vocab_size} {str(dtype).removeprefix('torch.')}",
        bytes_moved=num_reqs * block_size * vocab_size * dtype.itemsize,
        make=make,
    )


class Step:
    """Masked blocks, their logits, and the ways to unmask them."""

    def __init__(
        self,
        device: torch.device,
        sampled: bool,
        num_reqs: int,
        block_size: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.generator = generator = torch.Generator(device).manual_seed(0)
        self.logits = torch.empty(num_reqs * block_size, vocab_size, dtype=dtype, device=device)
        for row in self.logits:  # row by row: a float32 copy of all would not fit beside the rivals' own
            row.copy_(1.5 * torch.randn(vocab_size, generator=generator, device=device))
        # One token of every row stands out, by different amounts, so that confidences differ widely and never tie.
        likely = torch.randint(4, vocab_size, (len(self.logits), 1), generator=generator, device=device)
        height = 12 + 6 * torch.rand(likely.shape, generator=generator, device=device)
        self.logits.scatter_(1, likely, height.to(dtype))
        self.masked = torch.ones(num_reqs, block_size, dtype=torch.bool, device=device)
        self.token_ids = torch.full(self.masked.shape, MASK, device=device)
        self.confidence = torch.ones(self.masked.shape, device=device)
        self.positions = torch.arange(len(self.logits), device=device)
        requests = torch.arange(num_reqs, device=device)
        self.noise = PickNoise(TEMPERATURE, requests, 100 * requests) if sampled else None

    def ours(self) -> Unmasked:
        return unmask(
            self.logits,
            self.positions,
            self.token_ids,
            self.masked,
            self.confidence,
            MASK,
            THRESHOLD,
            REMAINING_STEPS,
            noise=self.noise,
        )

    def composition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unmasks with the lines of the published loop, for a batch."""
        picks, seen = self.token_ids.clone(), self.confidence.clone()
        picks.view(-1)[self.positions], seen.view(-1)[self.positions] = self.picks_composed()
        num_masked = self.masked.sum(-1)
        above = ((seen > THRESHOLD) & self.masked).sum(-1)
        quota = torch.maximum(above, (num_masked + REMAINING_STEPS - 1) // REMAINING_STEPS).clamp(min=1)
        rank = seen.masked_fill(~self.masked, -torch.inf).argsort(-1, descending=True).argsort(-1)
        commits = self.masked & (rank < quota[:, None])
        token_ids = torch.where(commits, picks, self.token_ids)
        return token_ids, torch.where(commits, seen, self.confidence), commits

    def picks(self) -> tuple[Tensor, Tensor]:
        return pick_tokens(self.logits, MASK, noise=self.noise)

    def picks_composed(self) -> tuple[Tensor, Tensor]:
        """Samples with noise from torch's generator; ours comes from a counter."""
        logits = self.logits.float().index_fill(1, torch.full((1,), MASK, device=self.logits.device), -torch.inf)
        probs = torch.softmax(logits, -1)
        if self.noise is None:
            seen, picks = probs.max(-1)
            return picks, seen
        weights = torch.softmax(logits / TEMPERATURE, -1)
        picks = (weights / torch.empty_like(weights).exponential_(generator=self.generator)).argmax(-1)
        return picks, probs.gather(-1, picks[:, None])[:, 0]

    def check(self) -> None:
        """Checks that greedy results agree with the composition, and sampled ones with the vectorised path on a CPU."""
        few, rows = slice(0, 2), self.masked[:2].numel()
        logits, positions = self.logits[:rows].cpu(), self.positions[:rows].cpu()
        noise = None
        if self.noise is not None:
            noise = PickNoise(TEMPERATURE, self.noise.seeds[few].cpu(), self.noise.first_positions[few].cpu())
        blocks = (x[few].cpu() for x in (self.token_ids, self.masked, self.confidence))
        expected = unmask(logits, positions, *blocks, MASK, THRESHOLD, REMAINING_STEPS, noise=noise)
        done = self.ours()
        agree((done.token_ids[few], done.confidence[few], done.commits[few]), vars(expected).values())
        if self.noise is None:
            agree(vars(done).values(), self.composition())
        if self.masked.shape[1] == 1:
            agree((x[few] for x in self.picks()), pick_tokens(logits, MASK, noise=noise))


def agree(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Raises unless results are the same, but for the order of float32 sums over 131,072 tokens."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=1e-4, rtol=0)


@one_by_one(cases(torch.device("cpu")))
def test_unmasking(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
