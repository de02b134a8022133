"""Picks, confidence and commits: the PyTorch path against definitions, the kernel against the same definitions."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import FLOAT32_OP, FLOAT64
from twotower_kernels.noise import gumbel_noise
from twotower_kernels.tuning import settings, trying
from twotower_kernels.unmasking import PickNoise, Unmasked, choose_commits, kernel, pick_tokens, unmask
from twotower_kernels.unmasking.reference import (
    choose_commits_reference,
    pick_tokens_reference,
    unmask_reference,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes with NumPy, which warns about infinities.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning"),
]

VOCAB, MASK = 37, 3
NEGATIVE, POSITIVE, NAN = -torch.inf, torch.inf, torch.nan
# Masked positions of three rows: some, none, one.
RAGGED = [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]

Step = dict[str, Any]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(masked: list[list[int]], dtype: torch.dtype = torch.float32, vocab: int = VOCAB, **changes: Any) -> Step:
    """Arguments of `unmask` for blocks with these masked positions."""
    is_masked = torch.tensor(masked).bool()
    positions = is_masked.flatten().nonzero()[:, 0]
    logits = (3 * randn(len(positions), vocab)).to(dtype)
    logits[:, MASK] = 50
    wide = torch.promote_types(dtype, torch.float32)
    step: Step = {
        "logits": logits,
        "positions": positions,
        "token_ids": torch.where(is_masked, MASK, 100 + torch.arange(is_masked.numel()).view_as(is_masked)),
        "masked": is_masked,
        "confidence": randn(*is_masked.shape, seed=1).sigmoid().to(wide),
        "mask_token_id": MASK,
        "confidence_threshold": 0.4,
        "remaining_steps": 3,
    }
    return step | changes


def noise_for(num_reqs: int, **changes: Any) -> PickNoise:
    """Noise with odd seeds and positions."""
    seeds = torch.tensor([-(2**63), 7, 2**62 + 3, 11, 12])[:num_reqs]
    return replace(PickNoise(0.7, seeds, torch.arange(num_reqs) * 2**31, 2), **changes)


def there(value: Any, device: torch.device) -> Any:
    if isinstance(value, PickNoise):
        return PickNoise(**{name: there(field, device) for name, field in vars(value).items()})
    return value.to(device) if isinstance(value, Tensor) else value


def run_kernel(device: torch.device, step: Step) -> Unmasked:
    done = kernel.launch_unmask(**{name: there(value, device) for name, value in step.items()})
    return Unmasked(done.token_ids.cpu(), done.confidence.cpu(), done.commits.cpu())


def assert_as_reference(done: Unmasked, step: Step, tolerance: float = FLOAT32_OP) -> None:
    expected = unmask_reference(**step)
    assert torch.equal(done.commits, expected.commits)
    assert torch.equal(done.token_ids, expected.token_ids)
    torch.testing.assert_close(done.confidence, expected.confidence, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert (done.token_ids.dtype, done.commits.dtype) == (torch.int64, torch.bool)


Path = Callable[[Step], Unmasked]


@pytest.fixture(params=["PyTorch", "kernel"])
def run(request: pytest.FixtureRequest, device: torch.device) -> Path:
    """Does a step by PyTorch and by the kernel."""
    if request.param == "kernel":
        return lambda step: run_kernel(device, step)
    return lambda step: unmask(**step)


@pytest.fixture
def small_splits() -> Iterator[None]:
    """Makes splits so small that rows of a few thousand tokens have several, the last one not full."""
    small = settings("unmasking", "unmask") | {"WIDTH_BYTES": 256, "TARGET_PROGRAMS": 4}
    with trying("unmasking", "unmask", small):
        yield


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_blocks_are_unmasked_as_position_by_position(run: Path, dtype: torch.dtype, sampled: bool) -> None:
    step = step_of(RAGGED, dtype, noise=noise_for(3) if sampled else None)
    before = step["logits"].clone()
    assert_as_reference(run(step), step)
    assert torch.equal(step["logits"], before)


@pytest.mark.parametrize("sampled", [False, True])
def test_in_float64_too(sampled: bool) -> None:
    step = step_of(RAGGED, torch.float64, noise=noise_for(3) if sampled else None)
    assert_as_reference(unmask(**step), step, FLOAT64)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_that_are_cut_into_splits_with_an_odd_rest(run: Path, sampled: bool) -> None:
    step = step_of([[1, 1], [0, 1]], torch.bfloat16, 9005, num_token_ids=9001, noise=noise_for(2) if sampled else None)
    step["logits"][:, 9001:] = 60
    step["logits"][0, 9000] = step["logits"][0, 5000] = 21  # the first of equal ones, in another split
    assert_as_reference(run(step), step)


@pytest.mark.parametrize("steps", [2, 5])
def test_every_row_has_its_own_schedule(run: Path, steps: int) -> None:
    thresholds, remaining = torch.tensor([0.1, 0.0, 0.99]), torch.tensor([steps, 1, 20], dtype=torch.int32)
    masked = [[1, 0, 1, 1, 1], [0, 1, 0, 1, 1], [1, 1, 1, 0, 0]]
    step = step_of(masked, confidence_threshold=thresholds, remaining_steps=remaining)
    done = run(step)
    assert_as_reference(done, step)
    assert torch.equal(done.commits[1], step["masked"][1]) and done.commits[2].sum() == 1


@pytest.mark.parametrize("block_size", [1, 17])
def test_blocks_of_any_size(run: Path, block_size: int) -> None:
    masked = (randn(2, block_size) > 0).int().tolist()
    step = step_of(masked, confidence_threshold=0.9, remaining_steps=2)
    assert_as_reference(run(step), step)


def test_of_equal_confidences_the_later_positions_go_first(run: Path) -> None:
    step = step_of([[1, 1, 0, 1, 1]], confidence_threshold=1.0, remaining_steps=2)
    step["logits"][:] = step["logits"][0].clone()
    assert run(step).commits.tolist() == [[False, False, False, True, True]]


def test_of_equal_logits_the_first_is_picked(run: Path) -> None:
    step = step_of([[1, 1]], remaining_steps=1)
    step["logits"][:] = torch.tensor([0.0, 1.0])[:, None]
    step["logits"][1, :2] = -1
    assert run(step).token_ids.tolist() == [[0, 2]]


@pytest.mark.parametrize("sampled", [False, True])
def test_undefined_and_infinite_logits_disturb_no_other_position(run: Path, sampled: bool) -> None:
    step = step_of([[1, 1, 1], [1, 1, 0]], remaining_steps=1, noise=noise_for(2) if sampled else None)
    clean = run(step)
    logits = step["logits"]
    logits[0] = NAN
    logits[1, 5], logits[1, 9] = POSITIVE, POSITIVE
    logits[2] = NEGATIVE
    logits[3, [7, 20]] = NAN
    done = run(step)
    assert_as_reference(done, step)
    assert torch.equal(done.token_ids[1, 1:], clean.token_ids[1, 1:])
    assert torch.equal(done.confidence[1, 1:], clean.confidence[1, 1:])
    assert done.confidence.isnan().tolist() == [[True, True, True], [True, False, False]]
    assert done.token_ids[0, 1:].tolist() == [5, 0] and done.token_ids[1, 0] == 7


def test_undefined_confidence_ranks_last(run: Path) -> None:
    step = step_of([[1, 1, 1, 1]], confidence_threshold=0.0, remaining_steps=4)
    step["logits"][1::2] = NAN
    assert run(step).commits.tolist() == [[True, False, True, False]]
    step |= {"confidence_threshold": 1.0, "remaining_steps": 2}
    step["logits"][:3] = NAN
    assert run(step).commits.tolist() == [[False, False, True, True]]


def test_almost_everything_excluded_still_gives_certainty(run: Path) -> None:
    step = step_of([[1, 1]], remaining_steps=1)
    step["logits"][:] = NEGATIVE
    step["logits"][:, MASK], step["logits"][0, 30], step["logits"][1, 0] = 5, 1e4, -1e4
    done = run(step)
    assert done.token_ids.tolist() == [[30, 0]] and done.confidence.tolist() == [[1, 1]]


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_may_be_cut_out_of_wider_ones(run: Path, sampled: bool) -> None:
    """The vocabulary is padded, and logits beyond the row are never read."""
    step = step_of(RAGGED, noise=noise_for(3) if sampled else None)
    padded = torch.full((8, VOCAB + 6), NAN)
    padded[::2, :VOCAB] = step["logits"]
    assert_as_reference(run(step | {"logits": padded[::2, :VOCAB]}), step)


@pytest.mark.parametrize(("num_token_ids", "sampled"), [(2, False), (20, True)])
def test_ids_beyond_those_allowed_are_as_if_they_were_not_there(run: Path, num_token_ids: int, sampled: bool) -> None:
    step = step_of(RAGGED, num_token_ids=num_token_ids, noise=noise_for(3) if sampled else None)
    step["logits"][:, num_token_ids:] += 30
    step["logits"][0, -1] = NAN
    done = run(step)
    assert_as_reference(done, step)
    assert int(done.token_ids[done.commits].max()) < num_token_ids


def test_noise_may_be_added_to_other_scores_than_the_logits(run: Path) -> None:
    step = step_of(RAGGED, remaining_steps=1)
    scores = step["logits"] / 1.3
    scores[:, MASK] = NEGATIVE
    scores[:, ::2] = NEGATIVE
    step["noise"] = noise_for(3, scores=scores)
    done = run(step)
    assert_as_reference(done, step)
    assert bool((done.token_ids[done.commits] % 2 == 1).all())


@pytest.mark.parametrize("sampled", [False, True])
def test_logits_of_every_position_are_read_where_it_is_masked(run: Path, sampled: bool) -> None:
    step = step_of(RAGGED, noise=noise_for(3) if sampled else None)
    everywhere = torch.full((15, VOCAB), NAN)
    everywhere[step["positions"]] = step["logits"]
    assert_as_reference(run(step | {"logits": everywhere, "positions": None}), step)


def test_positions_come_in_any_order(run: Path) -> None:
    step = step_of(RAGGED, noise=noise_for(3))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = step | {"logits": step["logits"][order], "positions": step["positions"][order]}
    assert_as_reference(run(shuffled), step)


@pytest.mark.parametrize("num_reqs", [0, 2])
def test_without_masked_positions_everything_stays(run: Path, num_reqs: int) -> None:
    step = step_of([[0, 0, 0]] * 2)
    step |= {name: step[name][:num_reqs] for name in ("token_ids", "masked", "confidence")}
    done = run(step)
    assert torch.equal(done.token_ids, step["token_ids"]) and torch.equal(done.confidence, step["confidence"])
    assert not done.commits.any()


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    step = step_of(RAGGED)
    with pytest.raises(ValueError, match=r"logits has 3 rows for 4 positions, of blocks \(3, 5\)"):
        unmask(**step | {"logits": step["logits"][:3]})
    with pytest.raises(ValueError, match=r"masked \(3, 4\)"):
        unmask(**step | {"masked": step["masked"][:, :4]})
    strided = step["logits"].t().contiguous().t()
    with pytest.raises(ValueError, match="the vocabulary must be contiguous"):
        run_kernel(device, step | {"logits": strided})


def test_counters_are_zero_after_every_launch(device: torch.device) -> None:
    step = step_of(RAGGED)
    first = run_kernel(device, step)
    # More requests than before, and fewer again.
    run_kernel(device, step_of([[1]] * 5))
    assert not kernel._counters(torch.empty(0, device=device).device, 5).any()
    again = run_kernel(device, step)
    assert torch.equal(first.token_ids, again.token_ids) and torch.equal(first.confidence, again.confidence)


Picker = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=["PyTorch", "kernel"])
def pick(request: pytest.FixtureRequest, device: torch.device) -> Picker:
    """Picks by PyTorch and by the kernel."""
    if request.param == "PyTorch":
        return pick_tokens

    def on_device(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        picks, confidence = kernel.launch_pick_tokens(there(logits, device), *(there(value, device) for value in args))
        return picks.cpu(), confidence.cpu()

    return on_device


@pytest.mark.parametrize("sampled", [False, True])
def test_pick_is_the_most_probable_or_a_sampled_token_and_never_the_mask(pick: Picker, sampled: bool) -> None:
    logits = randn(5, 13).float()
    logits[:, MASK] = 50
    noise = noise_for(5) if sampled else None
    picks, confidence = pick(logits, MASK, 11, noise)
    expected_picks, expected_confidence = pick_tokens_reference(logits, MASK, 11, noise)
    assert torch.equal(picks, expected_picks) and MASK not in picks
    torch.testing.assert_close(confidence, expected_confidence, atol=FLOAT32_OP, rtol=FLOAT32_OP)


def test_pick_in_float64_equals_its_definition() -> None:
    logits = randn(9, 13)
    logits[:, MASK] = 50
    picks, confidence = pick_tokens(logits.clone(), MASK)
    expected_picks, expected_confidence = pick_tokens_reference(logits, MASK)
    assert torch.equal(picks, expected_picks)
    torch.testing.assert_close(confidence, expected_confidence, atol=FLOAT64, rtol=FLOAT64)


def test_no_positions_give_no_picks(pick: Picker) -> None:
    picks, confidence = pick(torch.empty(0, 13), MASK)
    assert picks.shape == confidence.shape == (0,)


def test_confidence_of_a_noisy_pick_comes_from_the_logits() -> None:
    logits, noise = randn(5, 13), noise_for(5)
    logits[:, MASK] = -torch.inf
    picks, confidence = pick_tokens(logits, MASK, noise=noise)
    gumbel = gumbel_noise(noise.seeds, noise.first_positions, noise.draw, 13)
    assert torch.equal(picks, (logits / noise.temperature + gumbel).argmax(-1))
    expected = torch.softmax(logits, -1).gather(-1, picks[:, None])[:, 0]
    torch.testing.assert_close(confidence, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("remaining_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_commits_follow_the_published_rule(threshold: float, remaining_steps: int, ties: bool) -> None:
    confidence = randn(40, 7).sigmoid()
    if ties:
        confidence = (confidence * 3).round() / 3
    masked = randn(40, 7, seed=1) > 0
    masked[0], masked[1] = False, True
    commits = choose_commits(confidence, masked, threshold, remaining_steps)
    assert torch.equal(commits, choose_commits_reference(confidence, masked, threshold, remaining_steps))


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_captured_graphs_and_eager_launches_go_side_by_side(device: torch.device, sampled: bool) -> None:
    masked = (randn(8, 16) > -0.5).int().tolist()
    step = step_of(masked, torch.bfloat16, 131072, noise=noise_for(5) if sampled else None)
    if sampled:
        step["noise"] = replace(step["noise"], seeds=torch.arange(8), first_positions=torch.arange(8) * 16)
    expected = run_kernel(device, step)
    inputs = {name: there(value, device) for name, value in step.items()}
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    results = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(kernel.launch_unmask(**inputs))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        results.append(kernel.launch_unmask(**inputs))
    torch.cuda.synchronize()
    for done in results:
        assert torch.equal(done.token_ids.cpu(), expected.token_ids)
        assert torch.equal(done.commits.cpu(), expected.commits)
        assert torch.equal(done.confidence.cpu(), expected.confidence)
