"""Attention over pages: kernel and PyTorch path against the reference, and towers that run on the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.support.builders import random_ids, tiny_model
from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT32_MODEL, FLOAT32_OP
from twotower_kernels.block_attention import PagedBatch, attention, op, paged_attention, reads_pages
from twotower_kernels.block_attention.reference import paged_attention_reference
from twotower_kernels.tuning import trying
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState
from twotower_spec.state.block_context import CopiedKeys
from twotower_spec.state.paged_keys import PagedKeys

triton_kernel = pytest.importorskip("twotower_kernels.block_attention.kernel")

PAGE_SIZE = 4


@dataclass(frozen=True)
class Inputs:
    """Arguments of `paged_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    batch: PagedBatch


def inputs(
    contexts: list[int],
    queries: list[int],
    device: torch.device,
    *,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 10,
) -> Inputs:
    """Makes inputs: pages out of order, NaN wherever no context is, queries and keys as parts of one projection."""
    generator = torch.Generator().manual_seed(sum(contexts) + 7 * sum(queries))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    counts = [-(-length // PAGE_SIZE) for length in contexts]
    num_pages = sum(counts) + 3 + -(-sum(queries) // PAGE_SIZE)
    order = torch.randperm(num_pages, generator=generator).tolist()
    # Layer 1 of a cache of two, as the towers pass it. Slots that no request owns are NaN, the padding page too.
    caches = torch.full((2, 2, num_pages * PAGE_SIZE, kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
    table = torch.full((len(contexts), max(1, *counts) + 1), order[-1])
    for row, (length, count) in enumerate(zip(contexts, counts, strict=True)):
        table[row, :count] = torch.tensor([order.pop(0) for _ in range(count)])
        slots = [int(table[row, t // PAGE_SIZE]) * PAGE_SIZE + t % PAGE_SIZE for t in range(length)]
        caches[:, 1, slots] = randn(2, length, kv_heads, head_dim)
    heads = kv_heads * group
    projected = randn(sum(queries), heads + 2 * kv_heads, head_dim)
    query, key, value = projected.split([heads, kv_heads, kv_heads], dim=1)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()])
    lens, start_loc = (torch.as_tensor(x).to(device, torch.int32) for x in (contexts, starts))
    batch = PagedBatch(table.to(device, torch.int32), lens, start_loc, max(queries), causal)
    return Inputs(query, key, value, *caches[:, 1].unflatten(1, (-1, PAGE_SIZE)), batch)


def run(given: Inputs) -> Tensor:
    """Runs the kernel; whatever the launcher allocates and no program writes is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert given.query.new_empty(3).isnan().all()
        out: Tensor = triton_kernel.launch_paged_attention(*vars(given).values())
        return out
    finally:
        torch.use_deterministic_algorithms(False)


def attend_without_a_kernel(given: Inputs) -> Tensor:
    return paged_attention(**vars(given))


def expected_of(given: Inputs) -> Tensor:
    return paged_attention_reference(**vars(given))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=FLOAT32_OP, rtol=FLOAT32_OP)
    else:
        error, scale = (actual.float() - expected.float()).norm(), expected.float().norm()
        assert error / scale < BFLOAT16_RELATIVE


def engine_layout(given: Inputs, layout: str) -> Inputs:
    """The same in the cache of a serving engine: keys beside values, heads before tokens or behind, gaps of NaN."""
    num_pages, page_size, kv_heads, head_dim = given.key_cache.shape
    middle = (kv_heads, page_size) if "HND" in layout else (page_size, kv_heads)
    others = 3 if "layers between" in layout else 1
    room = given.key_cache.new_full((num_pages, others, *middle, 2 * head_dim), torch.nan)[:, others // 2]
    both = room.transpose(1, 2) if "HND" in layout else room
    keys, values = both.split(head_dim, dim=-1)
    keys.copy_(given.key_cache)
    values.copy_(given.value_cache)
    return replace(given, key_cache=keys, value_cache=values)


def written_beyond(given: Inputs) -> Inputs:
    """The same, to be stored in places that no context has, in any order."""
    free = given.key_cache.flatten(0, 1)[:, 0, 0].isnan().nonzero()[:, 0].flip(0)[: len(given.key)]
    assert len(free) == len(given.key)
    return replace(given, batch=replace(given.batch, written=free))


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Makes tiles so small that tiny shapes have several tiles and parts."""
    tiles = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, "KEYS_PER_PART": 16, "num_warps": 4, "num_stages": 2}
    with ExitStack() as stack:
        for name in ("attend", "attend_few_rows", "attend_float32"):
            stack.enter_context(trying("block_attention", name, tiles))
        yield


BATCHES = [
    pytest.param([0], [1], id="first token"),
    pytest.param([33], [1], id="one token"),
    pytest.param([5], [17], id="one block"),
    pytest.param([17, 0, 3, 40], [3, 17, 1, 16], id="ragged"),
    pytest.param([0, 0], [5, 5], id="no context"),
    pytest.param([17, 0, 40], [4, 4, 4], id="alike"),
    pytest.param([9, 4, 0], [0, 3, 0], id="requests without tokens"),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("contexts", "queries"), BATCHES)
@pytest.mark.usefixtures("small_tiles")
def test_kernel_computes_what_the_reference_does(
    contexts: list[int], queries: list[int], causal: bool, device: torch.device
) -> None:
    given = inputs(contexts, queries, device, causal=causal)
    assert_close(run(given), expected_of(given))


@pytest.mark.parametrize("in_triton", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("contexts", "queries"), BATCHES)
@pytest.mark.usefixtures("small_tiles")
def test_keys_and_values_of_the_pass_are_stored_where_the_batch_says_and_nowhere_else(
    contexts: list[int], queries: list[int], causal: bool, in_triton: bool, device: torch.device
) -> None:
    given = written_beyond(inputs(contexts, queries, device if in_triton else torch.device("cpu"), causal=causal))
    plain = inputs(contexts, queries, given.query.device, causal=causal)
    attend = run if in_triton else attend_without_a_kernel
    assert torch.equal(attend(given), attend(plain))
    for cache, before, new in (
        (given.key_cache, plain.key_cache, given.key),
        (given.value_cache, plain.value_cache, given.value),
    ):
        before.flatten(0, 1)[given.batch.written] = new
        assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("layout", ["NHD", "HND", "NHD, layers between", "HND, layers between"])
@pytest.mark.usefixtures("small_tiles")
def test_pages_are_read_with_the_strides_of_an_engine_s_cache(layout: str, device: torch.device) -> None:
    given = inputs([17, 0, 3, 40], [3, 17, 1, 16], device)
    assert torch.equal(run(engine_layout(given, layout)), run(given))
    on_cpu = inputs([17, 0, 3, 40], [3, 17, 1, 16], torch.device("cpu"))
    assert torch.equal(paged_attention(**vars(engine_layout(on_cpu, layout))), paged_attention(**vars(on_cpu)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("contexts", "queries"), BATCHES)
def test_the_path_without_a_kernel_computes_what_the_reference_does(
    contexts: list[int], queries: list[int], causal: bool
) -> None:
    given = inputs(contexts, queries, torch.device("cpu"), causal=causal)
    assert_close(paged_attention(**vars(given)), expected_of(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(1, 1, 16), (2, 16, 32), (3, 2, 1), (1, 5, 72)], ids=lambda size: str(size)
)
def test_any_geometry_and_dtype_is_computed_with_the_tables_own_tiles(
    dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, device: torch.device
) -> None:
    given = inputs([70, 3], [5, 2], device, causal=True, dtype=dtype, kv_heads=kv_heads, group=group, head_dim=head_dim)
    assert_close(run(given), expected_of(given))


@pytest.mark.parametrize("part", [16, 32, 512])
def test_the_number_of_parts_changes_rounding_only(part: int, device: torch.device) -> None:
    given = inputs([130, 0, 1, 65], [2, 5, 3, 1], device, causal=True)
    tiles = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, "KEYS_PER_PART": part, "num_warps": 4, "num_stages": 2}
    with trying("block_attention", "attend_float32", tiles):
        assert_close(run(given), expected_of(given))


@pytest.mark.parametrize(
    ("programs", "longest", "parts"),
    [(4, 8192, 32), (4, 1 << 20, 64), (300, 8192, 1), (128, 8192, 2), (2, 255, 1), (2, 0, 1)],
)
def test_contexts_are_divided_while_programs_are_few_and_parts_long_enough(
    programs: int, longest: int, parts: int
) -> None:
    assert triton_kernel.parts_of_context(programs, longest, keys_per_part=256) == parts


@pytest.mark.parametrize("part", [16, 512])
def test_a_requests_own_nan_arrives_and_stays_with_it(part: int, device: torch.device) -> None:
    given = inputs([40, 21, 40], [3, 3, 3], device)
    tiles = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, "KEYS_PER_PART": part, "num_warps": 4, "num_stages": 2}
    given.key_cache[int(given.batch.block_table[1, 0])] = torch.nan
    with trying("block_attention", "attend_float32", tiles):
        out = run(given)
    assert out.isfinite().flatten(1).all(1).tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert out[3:6].isnan().all()


def test_nan_of_a_later_token_does_not_reach_earlier_ones_in_a_causal_pass(device: torch.device) -> None:
    given = inputs([5], [20], device, causal=True)
    given.key[13] = torch.nan
    assert run(given).isfinite().flatten(1).all(1).tolist() == [True] * 13 + [False] * 7


@pytest.mark.parametrize("part", [16, 512])
def test_scores_that_are_large_or_minus_infinite_are_weighed_as_by_softmax(part: int, device: torch.device) -> None:
    given = inputs([40, 40], [3, 3], device)
    given.query.abs_()
    given.key_cache.mul_(1e4)
    for page in given.batch.block_table[0, :5].tolist():  # a whole part of the first request has weight 0
        given.key_cache[page] = -torch.inf
    tiles = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, "KEYS_PER_PART": part, "num_warps": 4, "num_stages": 2}
    with trying("block_attention", "attend_float32", tiles):
        out = run(given)
    assert out.isfinite().all()
    assert_close(out, expected_of(given))


def test_a_wider_bound_on_the_queries_changes_nothing(device: torch.device) -> None:
    given = inputs([5, 9], [3, 1], device, causal=True)
    assert torch.equal(run(replace(given, batch=replace(given.batch, max_query_len=64))), run(given))


def test_tokens_behind_the_last_request_leave_the_others_alone(device: torch.device) -> None:
    given = inputs([5, 9], [3, 4], device)
    fewer = replace(
        given.batch,
        query_start_loc=given.batch.query_start_loc[:2],
        context_lens=given.batch.context_lens[:1],
        block_table=given.batch.block_table[:1],
    )
    assert torch.equal(run(replace(given, batch=fewer))[:3], run(given)[:3])


def test_a_bidirectional_block_is_attention_without_a_mask(device: torch.device) -> None:
    given = inputs([4], [7], device)
    page = int(given.batch.block_table[0, 0])
    keys, values = torch.cat([given.key_cache[page], given.key]), torch.cat([given.value_cache[page], given.value])
    assert_close(run(given), attention(given.query[None], keys[None], values[None])[0])


def test_dispatch_takes_the_kernel_where_triton_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given, marker = inputs([5], [3], torch.device("cpu")), torch.zeros(1)
    monkeypatch.setattr(triton_kernel, "launch_paged_attention", lambda *args: marker)
    assert paged_attention(**vars(given)) is not marker
    monkeypatch.setattr(op, "use_triton", lambda *tensors: True)
    assert paged_attention(**vars(given)) is marker


@pytest.mark.parametrize(
    ("dtype", "head_dim", "read"), [("float32", 128, True), ("float64", 8, False), ("half", 129, False)]
)
def test_what_the_tiles_do_not_hold_is_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, dtype: str, head_dim: int, read: bool
) -> None:
    monkeypatch.setattr(op, "use_triton", lambda *tensors: True)
    assert reads_pages(torch.empty(1, 1, head_dim, dtype=getattr(torch, dtype))) is read


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key", lambda x: x[:-1], r"key has shape \[2, 2, 10\]; beside query \[3, 6, 10\] give \[3, 2, 10\]"),
        ("query", lambda x: x[:, :5], "5 heads are not a multiple of 2"),
        ("value_cache", lambda x: x.half(), "give one dtype"),
        ("query", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "stride 1"),
        ("block_table", lambda x: x.long(), "give int32"),
        ("query_start_loc", lambda x: x[1:], r"query_start_loc has shape \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    given = inputs([5], [3], torch.device("cpu"))
    if name in vars(given):
        given = replace(given, **{name: change(getattr(given, name))})
    else:
        given = replace(given, batch=replace(given.batch, **{name: change(getattr(given.batch, name))}))
    with pytest.raises(ValueError, match=message):
        paged_attention(**vars(given))


# Whole towers


@pytest.fixture
def model() -> TwoTowerModel:
    return tiny_model("float32", hybrid_override_pattern="M*E*M")


@pytest.fixture
def on_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches the kernel on and off, as a GPU would."""
    return lambda wanted: monkeypatch.setattr(op, "use_triton", lambda *tensors: wanted)


ROWS = {"a": random_ids(13), "b": random_ids(2, seed=1), "c": random_ids(9, seed=2), "d": random_ids(1, seed=3)}


def new_state(model: TwoTowerModel, denoiser_dtype: torch.dtype | None = None) -> ContextState:
    return ContextState(model.config, 5, 60, model.dtype, page_size=PAGE_SIZE, denoiser_dtype=denoiser_dtype)


def interleaved(
    model: TwoTowerModel, rows: dict[str, list[int]] = ROWS, denoiser_dtype: torch.dtype | None = None
) -> ContextState:
    """State whose requests took pages in turns; read by PyTorch or by the kernel, whichever is on."""
    state = new_state(model, denoiser_dtype)
    for start in range(0, 13, 3):
        state.extend(model.context, {n: r[start : start + 3] for n, r in rows.items() if r[start : start + 3]})
    pages = state.entry("a").pages
    assert pages != list(range(pages[0], pages[0] + len(pages)))
    return state


def assert_same_model(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=FLOAT32_MODEL, rtol=FLOAT32_MODEL)


def test_a_ragged_extension_over_scattered_pages_gives_the_same_logits_and_cache(
    model: TwoTowerModel, on_kernel: Callable[[bool], None]
) -> None:
    more = {"c": random_ids(7, seed=5), "a": random_ids(1, seed=6), "new": random_ids(5, seed=7)}
    logits, states = [], []
    for kernel in (False, True):
        on_kernel(kernel)
        state = interleaved(model)
        given = state.extend(model.context, more, logits="all").logits
        assert given is not None
        logits.append(given)
        states.append(state)
    assert_same_model(logits[1], logits[0])
    assert_same_model(states[1].kv_cache.keys, states[0].kv_cache.keys)
    assert_same_model(states[1].kv_cache.values, states[0].kv_cache.values)


def test_a_provisional_pass_is_accepted_alike(model: TwoTowerModel, on_kernel: Callable[[bool], None]) -> None:
    logits = []
    for kernel in (False, True):
        on_kernel(kernel)
        state = interleaved(model)
        block = {name: random_ids(4, seed=i) for i, name in enumerate("acd")}
        state.extend(model.context, block, logits="all", provisional=True).accept({"a": 2, "c": 0, "d": 4})
        given = state.extend(model.context, {"d": [5], "a": [6], "c": [7]}).logits
        assert given is not None
        logits.append(given)
    assert_same_model(logits[1], logits[0])


@pytest.mark.parametrize("block_size", [1, 5])
def test_a_denoised_block_over_scattered_pages_gets_the_same_logits(
    model: TwoTowerModel, block_size: int, on_kernel: Callable[[bool], None]
) -> None:
    block = torch.tensor([random_ids(block_size, seed=row) for row in range(4)])
    t = torch.tensor([0.25, 1.0, 0.5, 0.75])
    on_kernel(False)
    state, logits = interleaved(model), []
    for kernel in (False, True):
        on_kernel(kernel)
        context = state.block_context(["d", "a", "c", "b"], block_size)
        assert isinstance(context.keys, PagedKeys if kernel else CopiedKeys)
        some = context.select([2, 0])
        with torch.inference_mode():
            step = model.denoiser.step(block, context, t)
            logits.append((step, model.denoiser.step(block[:2], some, t[:2]), model.denoiser.step(block, context, t)))
    for actual, expected in zip(logits[1], logits[0], strict=True):
        assert_same_model(actual, expected)


def test_the_denoiser_reads_the_pool_in_place_and_takes_no_memory_for_keys(
    model: TwoTowerModel, on_kernel: Callable[[bool], None]
) -> None:
    on_kernel(True)
    state = interleaved(model)
    before = state.kv_cache.keys.clone(), state.kv_cache.values.clone()
    context = state.block_context(list("ab"), 3)
    assert isinstance(context.keys, PagedKeys) and context.keys.pages is state.kv_cache.pages
    with torch.inference_mode():
        model.denoiser.step(torch.full((2, 3), 3), context, torch.ones(2))
    assert state.workspace_nbytes == 0
    assert torch.equal(state.kv_cache.keys, before[0]) and torch.equal(state.kv_cache.values, before[1])


def test_a_denoiser_of_another_dtype_reads_a_copy_of_the_pages(
    model: TwoTowerModel, on_kernel: Callable[[bool], None]
) -> None:
    wide = tiny_model("float64", hybrid_override_pattern="M*E*M")
    on_kernel(False)
    state, logits = interleaved(wide, denoiser_dtype=torch.float32), []
    block = torch.tensor([random_ids(3), random_ids(3, seed=1)])
    for kernel in (False, True):
        on_kernel(kernel)
        context = state.block_context(["c", "a"], 3)
        assert not kernel or (isinstance(context.keys, PagedKeys) and context.keys.pages is not state.kv_cache.pages)
        with torch.inference_mode():
            logits.append(model.denoiser.step(block, context, torch.ones(2)))
    assert_same_model(logits[1], logits[0])


def test_nan_of_one_request_does_not_reach_the_others_through_the_kernel(
    model: TwoTowerModel, on_kernel: Callable[[bool], None]
) -> None:
    on_kernel(True)
    state, names = interleaved(model), list("bac")
    for cache in (state.kv_cache.keys, state.kv_cache.values):
        cache.unflatten(1, (-1, PAGE_SIZE))[:, state.entry("a").pages] = torch.nan
    with torch.inference_mode():
        logits = model.denoiser.step(torch.full((3, 5), 3), state.block_context(names, 5), torch.ones(3))
    assert logits.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    extended = state.extend(model.context, {name: [9, 8] for name in names}).logits
    assert extended is not None and extended.isfinite().all(1).tolist() == [True, False, True]
