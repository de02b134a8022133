"""The Triton kernels of `acceptance` and of the noise against their references, in the interpreter or on the device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.test_acceptance import cumulative, likely_drafts, sampling_for
from twotower_kernels.acceptance import AcceptanceRule, Accepted, SamplingTensors, kernel, op
from twotower_kernels.acceptance.reference import accept_reference
from twotower_kernels.noise import gumbel_argmax, gumbel_noise, reproducible_log, uniform_noise
from twotower_kernels.noise import kernel as noise_kernel
from twotower_kernels.tuning import Settings, settings, trying

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VOCAB = 37  # that of `sampling_for`


def verify(
    device: torch.device,
    logits: Tensor,
    drafts: Tensor,
    counts: list[int],
    sampling: SamplingTensors,
    rule: AcceptanceRule,
) -> Accepted:
    fields = (vars(sampling)[name] for name in SamplingTensors.__dataclass_fields__)
    there = SamplingTensors(*(value if value is None else value.to(device) for value in fields))
    most = max(counts, default=0)
    done = kernel.launch_accept(logits.to(device), drafts.to(device), cumulative(counts).to(device), most, there, rule)
    return Accepted(done.token_ids.cpu(), done.num_accepted.cpu())


def assert_as_reference(
    device: torch.device,
    logits: Tensor,
    drafts: Tensor,
    counts: list[int],
    sampling: SamplingTensors,
    rule: AcceptanceRule,
) -> None:
    before = logits.clone()
    done = verify(device, logits, drafts, counts, sampling, rule)
    expected = accept_reference(logits, drafts, cumulative(counts), max(counts), sampling, rule)
    width = max(counts) + 1
    assert done.token_ids.tolist() == [tokens + [-1] * (width - len(tokens)) for tokens in expected]
    assert done.num_accepted.tolist() == [len(tokens) - 1 for tokens in expected]
    assert done.token_ids.dtype == done.num_accepted.dtype == torch.int32
    assert logits.equal(before) or bool(before.isnan().any())


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_requests_greedy_and_sampled_with_and_without_filters(
    device: torch.device, rule: AcceptanceRule, dtype: torch.dtype
) -> None:
    counts = [1, 0, 3, 0, 2]
    logits = random_logits(sum(counts) + len(counts)).to(dtype)
    sampling = sampling_for(len(counts))
    assert_as_reference(device, logits, likely_drafts(logits, counts, sampling, rule), counts, sampling, rule)


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
def test_rows_that_are_cut_into_splits_with_an_odd_rest(device: torch.device, rule: AcceptanceRule) -> None:
    counts = [2, 0]
    logits = random_logits(4, vocab=4099).bfloat16()
    sampling = sampling_for(2, temperature=torch.tensor([0.8, 1.1]), top_k=None, top_p=None, min_p=None)
    drafts = likely_drafts(logits, counts, sampling, rule)
    with small_tiles({"WIDTH": 64, "TARGET_PROGRAMS": 1000}):
        assert_as_reference(device, logits, drafts, counts, sampling, rule)
        assert_as_reference(device, logits, logits.argmax(-1)[:2], counts, greedy(2), rule)


@contextmanager
def small_tiles(changes: Settings) -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("judge_rows", "judge_one_hot"):
            stack.enter_context(trying("acceptance", name, settings("acceptance", name) | changes))
        yield


def greedy(num_reqs: int) -> SamplingTensors:
    zeros = torch.zeros(num_reqs, dtype=torch.int64)
    return SamplingTensors(None, None, None, None, zeros, zeros)


def test_of_equal_logits_the_first_is_taken_as_argmax_does(device: torch.device) -> None:
    logits = torch.tensor([[0.0] * 5, [1.0, 2.0, 2.0, 0.0, 2.0], [-torch.inf] * 5, [-0.0, 0.0, -1.0, 0.0, -0.0]])
    done = verify(device, logits, torch.zeros(0, dtype=torch.int64), [0] * 4, greedy(4), "one-hot")
    assert done.token_ids[:, 0].tolist() == logits.argmax(-1).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
def test_infinite_and_undefined_logits_are_ranked_as_argmax_does(device: torch.device, rule: AcceptanceRule) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [1.0, nan, inf, nan, 5.0],
            [1.0, inf, -inf, inf, 5.0],
            [-inf, -inf, -inf, -inf, -inf],
            [-inf, -inf, 2.0, -inf, -inf],
            [nan, nan, nan, nan, nan],
        ]
    )
    for sampling in (greedy(5), sampling_for(5, temperature=torch.ones(5), top_k=None, top_p=None, min_p=None)):
        counts = [0] * 5
        assert_as_reference(device, logits, torch.zeros(0, dtype=torch.int64), counts, sampling, rule)
        done = verify(device, logits, torch.zeros(0, dtype=torch.int64), counts, sampling, rule)
        assert done.token_ids[:, 0].tolist() == [1, 1, 0, 2, 0]


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
def test_undefined_logits_of_a_request_with_filters_do_not_reach_the_others(
    device: torch.device, rule: AcceptanceRule
) -> None:
    logits = random_logits(4)
    sampling = sampling_for(4, temperature=torch.ones(4))
    alone = verify(device, logits, torch.zeros(0, dtype=torch.int64), [0] * 4, sampling, rule)
    logits[1] = torch.nan
    done = verify(device, logits, torch.zeros(0, dtype=torch.int64), [0] * 4, sampling, rule)
    assert done.token_ids[[0, 2, 3]].equal(alone.token_ids[[0, 2, 3]])
    assert 0 <= int(done.token_ids[1, 0]) < VOCAB


@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
def test_rows_may_be_cut_out_of_wider_ones(device: torch.device, rule: AcceptanceRule) -> None:
    """The vocabulary is padded, and logits beyond the row are never read."""
    counts = [2, 1]
    padded = torch.full((10, VOCAB + 6), torch.nan)
    padded[::2, :VOCAB] = random_logits(5)
    logits = padded[::2, :VOCAB]
    sampling = sampling_for(2, temperature=torch.tensor([1.0, 0.7]))
    drafts = likely_drafts(logits, counts, sampling, rule)
    assert_as_reference(device, logits, drafts, counts, sampling, rule)


def test_undefined_logits_of_a_filtered_row_are_found_wherever_they_stand(device: torch.device) -> None:
    """With blocks of 32 tokens: in the first, in the last, and where the probability of a draft depends on it."""
    given = {"top_k": None, "top_p": None, "min_p": torch.full((2,), 0.5)}
    sampling = sampling_for(2, temperature=torch.ones(2), **given)
    with small_tiles({"FILTER_BLOCK": 32}):
        for where in (2, 36):
            logits = random_logits(4, seed=where)
            logits[0, where] = logits[2, where] = torch.nan
            drafts = torch.tensor([where, 5])
            for rule in ("one-hot", "coupled"):
                assert_as_reference(device, logits, drafts, [1, 1], sampling, rule)


def test_parameters_of_requests_may_be_strided(device: torch.device) -> None:
    sampling, logits = sampling_for(3), random_logits(5)
    strided = SamplingTensors(
        *(torch.stack([value, value * 0], dim=1)[:, 0] for value in vars(sampling).values() if value is not None)
    )
    drafts = torch.tensor([[3, 0], [5, 0]])[:, 0]
    assert not strided.seeds.is_contiguous() and not drafts.is_contiguous()
    assert_as_reference(device, logits, drafts, [1, 0, 1], strided, "one-hot")


def test_a_strided_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the vocabulary must be contiguous"):
        kernel.launch_accept(torch.zeros(5, 2).t()[:1], torch.zeros(0), cumulative([0]), 0, greedy(1), "coupled")


def test_drafts_outside_the_vocabulary_are_rejected(device: torch.device) -> None:
    logits = random_logits(6)
    sampling = sampling_for(2, temperature=torch.tensor([0.0, 1.0]), top_k=None, top_p=None, min_p=None)
    for rule in ("one-hot", "coupled"):
        assert_as_reference(device, logits, torch.tensor([-1, 5, VOCAB, 3]), [2, 2], sampling, rule)


def test_no_request_at_all(device: torch.device) -> None:
    done = verify(device, torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.int64), [], greedy(0), "one-hot")
    assert done.token_ids.shape == (0, 1) and done.num_accepted.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_samples_are_those_of_the_full_noise_bit_for_bit(
    device: torch.device, dtype: torch.dtype, spread: float
) -> None:
    scores = (spread * torch.randn(3, 2309, generator=torch.Generator().manual_seed(1))).to(dtype)
    seeds, positions = torch.tensor([-(2**63), 7, 2**62 + 3]), torch.tensor([0, 2**33, 5])
    full = (scores.float() + gumbel_noise(seeds, positions, 3, scores.shape[1])).argmax(-1)
    assert gumbel_argmax(scores, seeds, positions, 3).equal(full)
    there = noise_kernel.launch_gumbel_argmax(scores.to(device), seeds.to(device), positions.to(device), 3)
    assert there.cpu().equal(full)


@triton.jit
def _write_noise(seed, position, uniforms, noise, SIZE: tl.constexpr):
    key, other = noise_kernel.row_keys(tl.load(seed), tl.load(position), 3)
    counters = tl.arange(0, SIZE)
    numbers = noise_kernel.uniform(noise_kernel.hash_bits(counters, key, other))
    tl.store(uniforms + counters, numbers)
    tl.store(noise + counters, -noise_kernel.reproducible_log(-noise_kernel.reproducible_log(numbers)))


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**63)])
def test_numbers_and_their_logarithms_are_the_same_bit_for_bit(device: torch.device, seed: int) -> None:
    given = torch.tensor([seed]), torch.tensor([2**33 + 5])
    found = torch.empty(2, 256, device=device)
    _write_noise[(1,)](*(x.to(device) for x in given), found[0], found[1], SIZE=256, **noise_kernel.LAUNCH)
    expected = uniform_noise(*given, 3, 256)[0]
    assert found[0].cpu().equal(expected)
    assert found[1].cpu().equal(-reproducible_log(-reproducible_log(expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["one-hot", "coupled"])
def test_a_captured_graph_verifies_new_inputs(device: torch.device, rule: AcceptanceRule) -> None:
    counts = [3, 0, 15]
    inputs = [random_logits(21, seed=seed).bfloat16() for seed in (1, 2)]
    sampling = sampling_for(3)
    drafts = likely_drafts(inputs[0], counts, sampling, rule)
    there = SamplingTensors(*(value if value is None else value.to(device) for value in vars(sampling).values()))
    logits, ids, cu = inputs[0].to(device), drafts.to(device), cumulative(counts).to(device)
    kernel.launch_accept(logits, ids, cu, 15, there, rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        done = kernel.launch_accept(logits, ids, cu, 15, there, rule)
    for given in inputs:
        logits.copy_(given)
        graph.replay()
        expected = accept_reference(given, drafts, cumulative(counts), 15, sampling, rule)
        assert [[t for t in row if t >= 0] for row in done.token_ids.tolist()] == expected


def test_warming_up_launches_what_requests_will_need(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(op, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(kernel, "launch_accept", lambda *arguments: launched.append(arguments[4:]))
    op.warm_up(8, torch.bfloat16, torch.device("cpu"), "coupled")
    kinds = [(sampling.temperature is None, sampling.filters) for sampling, _ in launched]
    assert sorted(kinds) == sorted(2 * [(True, False), (False, False), (False, True)])  # bfloat16 and float32
    assert {rule for _, rule in launched} == {"coupled"}
