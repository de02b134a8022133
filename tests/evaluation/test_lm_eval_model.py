"""The model `twotower` of lm-eval, on the trio; parts that need lm-eval itself are skipped without it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.tolerances import FLOAT32_OP, FLOAT64
from twotower_spec.checkpoint import load_tokenizer
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import likelihood
from twotower_spec.evaluation.likelihood import Likelihood, log_likelihoods
from twotower_spec.evaluation.lm_eval_model import Loaded, Task, TwoTowerTasks, register
from twotower_spec.generation import Mode, ModeOptions
from twotower_spec.model import TwoTowerModel
from twotower_spec.state import ContextState

ROOT = Path(__file__).parents[2]
LOCAL_TASK = ROOT / "examples" / "local_task"
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed; pip install 'twotower-spec[eval]'"
)


class WithoutHarness(TwoTowerTasks):
    """Stand-in for the parts of lm-eval's base class that are used."""

    rank = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remembered: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.remembered.append(entry))


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in args]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    directory = trio_path("twotower")
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return Loaded(TwoTowerModel.from_pretrained(directory, dtype="float32", progress=False), tokenizer)


def reference(towers: TwoTowerModel, context: list[int], continuation: list[int]) -> Likelihood:
    """Scores one continuation in one pass over all tokens, in float64."""
    tokens = [*context, *continuation]
    state = ContextState(towers.config, 1, len(tokens), towers.dtype)
    logits = state.extend(towers.context, {0: tokens[:-1]}, logits="all").logits
    assert logits is not None
    wanted = torch.tensor(continuation)
    rows = logits[len(context) - 1 :].double().log_softmax(-1)
    total = float(rows.gather(1, wanted[:, None]).sum())
    return Likelihood(total, bool((rows.argmax(-1) == wanted).all()))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("at_once", [2, 256])
def test_likelihoods_are_those_of_one_pass_over_everything(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, at_once: int
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    towers = TwoTowerModel.from_pretrained(trio_path("twotower"), dtype="float64", towers="context", progress=False)
    long, short = [1, 386, 29, 492, 286, 77, 12], [1, 9]
    greedy = towers.generate_ar([long], 3).token_ids[0]
    pairs = [
        (long, [44]),
        (short, [5, 6, 7, 8, 9]),
        (long, greedy),
        ([1], [30]),
        (long, [45]),
        (long, [*greedy[:2], (greedy[2] + 1) % 2000]),
    ]
    found = log_likelihoods(towers, pairs, batch_size)
    for (context, continuation), one in zip(pairs, found, strict=True):
        expected = reference(towers, context, continuation)
        assert one.greedy == expected.greedy
        assert one.log_probability == pytest.approx(expected.log_probability, abs=FLOAT64)
    assert found[2].greedy and not found[5].greedy


def test_continuation_of_nothing_is_certain_and_context_of_nothing_refused(loaded: Loaded) -> None:
    assert log_likelihoods(loaded.towers, [([1], [])]) == [Likelihood(0.0, True)]
    with pytest.raises(ArgumentError, match="pair 0 is empty"):
        log_likelihoods(loaded.towers, [([], [4])])


def test_equal_contexts_are_read_once(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    read: list[int] = []
    extend = ContextState.extend

    def count(self: ContextState, tower: Any, increments: Any, **options: Any) -> Any:
        read.append(sum(map(len, increments.values())))
        return extend(self, tower, increments, **options)

    monkeypatch.setattr(ContextState, "extend", count)
    context = [1, 386, 29, 492, 286]
    log_likelihoods(loaded.towers, [(context, [letter]) for letter in (34, 35, 36, 37)])
    assert sum(read) == len(context)


@pytest.mark.parametrize("mode", list(Mode))
def test_text_ends_before_the_first_stop_string_in_every_mode(loaded: Loaded, mode: str) -> None:
    whole = WithoutHarness(loaded, mode=mode, max_gen_toks=24).generate_until(requests(("Question: How", {})), True)[0]
    stop = whole[5:8]
    model = WithoutHarness(loaded, mode=mode)
    arguments = {"until": ["never", stop], "max_gen_toks": 24, "do_sample": False}
    assert model.generate_until(requests(("Question: How", arguments)), True) == [whole[: whole.index(stop)]]
    assert model.remembered == [("generate_until", ("Question: How", arguments), whole[: whole.index(stop)])]


def test_batch_has_the_texts_of_its_rows_in_the_order_of_the_requests(loaded: Loaded) -> None:
    contexts = ["Question: Zoe has 9 kites.", "def", "# A registry of functions that mark baskets, by finish.\nclass"]
    asked = requests(*[(context, {"until": ["\n"], "max_gen_toks": 9 + i % 2}) for i, context in enumerate(contexts)])
    one_by_one = WithoutHarness(loaded, mode="self-speculative").generate_until(asked, True)
    together = WithoutHarness(loaded, mode="self-speculative", batch_size="3").generate_until(asked, True)
    assert together == one_by_one


def test_special_token_as_stop_string_ends_the_text_though_it_is_not_shown(loaded: Loaded) -> None:
    text = WithoutHarness(loaded, mode="ar").generate_until(requests(("", {"until": "<eos>", "max_gen_toks": 5})), True)
    assert "<eos>" not in text[0]


def test_text_ends_at_the_end_tokens_of_the_checkpoint(loaded: Loaded, tmp_path: Path) -> None:
    ids = loaded.tokenizer("Question: How")["input_ids"]
    written = loaded.towers.generate_ar([ids], 24).token_ids[0]
    end = written[6]
    expected = loaded.tokenizer.decode(written[: written.index(end)], skip_special_tokens=True)
    directory = Path(shutil.copytree(trio_path("twotower"), tmp_path / "T"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    asked = requests(("Question: How", {"max_gen_toks": 24}))
    of_files = WithoutHarness(directory, mode="ar", dtype="float32")
    in_memory = WithoutHarness(replace(loaded, end_token_ids=[end]), mode="ar")
    assert of_files.generate_until(asked, True) == in_memory.generate_until(asked, True) == [expected]
    assert of_files.eot_token_id == 2


def test_sampled_text_of_a_request_depends_on_its_seed_and_not_on_the_batch(loaded: Loaded) -> None:
    asked = requests(*[("Question: Zoe has", {"max_gen_toks": 7, "until": []})] * 3)
    texts = WithoutHarness(loaded, mode="ar", temperature=1.5, batch_size=3).generate_until(asked, True)
    assert len(set(texts)) > 1
    assert WithoutHarness(loaded, mode="ar", temperature=1.5).generate_until(asked, True) == texts
    assert WithoutHarness(loaded, mode="ar", temperature=1.5, seed=1).generate_until(asked[:1], True) == texts[1:2]


def test_temperature_of_the_task_counts_only_where_it_samples_and_that_of_the_model_always(loaded: Loaded) -> None:
    task = WithoutHarness(loaded)
    assert task._generation_request({"temperature": 0.7, "do_sample": False}).options.temperature == 0
    assert task._generation_request({"temperature": 0.7}).options.temperature == 0.7
    assert task._generation_request({"temperature": 0.7, "do_sample": True, "top_p": 0.9}).options.top_p == 0.9
    assert WithoutHarness(loaded, temperature=0.3)._generation_request({}).options.temperature == 0.3
    assert task._generation_request({"max_tokens": 12}).options.max_new_tokens == 12


def test_long_prompt_loses_its_beginning(loaded: Loaded) -> None:
    model = WithoutHarness(loaded, mode="ar", max_length=12)
    ids = model.tok_encode("Question: Zoe has 9 kites. Tomas has 4 times as many kites as Zoe.")
    assert len(ids) > 12
    context = {"until": [], "max_gen_toks": 4}
    text = model.generate_until(requests((loaded.tokenizer.decode(ids, skip_special_tokens=True), context)), True)
    expected = loaded.towers.generate_ar([ids[-8:]], 4, eos_token_id=2).token_ids[0]
    assert text == [loaded.tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "tree"}, "mode 'tree'"),
        ({"mode": "ar", "gamma": 0.8}, "denoises no blocks"),
        ({"gamma": 7}, "confidence_threshold 7"),
        ({"batch_size": "auto"}, "batch_size 'auto'"),
        ({"temprature": 1}, "temprature"),
        ({"max_length": 1}, "max_length 1"),
        ({"temperature": -1}, "temperature -1"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_bad_model_argument_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(TwoTowerModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ArgumentError, match=words):
        WithoutHarness(trio_path("twotower"), **arguments)


def test_default_device_of_the_harness_is_the_processor_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = WithoutHarness(trio_path("twotower"), mode="ar", device="cuda:0")
    assert model.towers.context.device.type == "cpu" and not model.towers.has_denoiser
    assert "using cpu" in caplog.text


def test_text_that_leaves_no_room_for_a_prompt_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ArgumentError, match="256 new tokens leave no room"):
        WithoutHarness(loaded, max_length=256).generate_until(requests(("a", {})), True)


def test_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower_spec.extras.find_spec", lambda _: None)
    with pytest.raises(ArgumentError, match=r"twotower-spec\[eval\]"):
        Task("gsm8k").check()


@needs_lm_eval
def test_harness_knows_the_model_by_its_name() -> None:
    from lm_eval.api.registry import get_model

    model = register()
    assert get_model("twotower") is model


@needs_lm_eval
def test_rolling_likelihood_is_the_sum_over_windows(loaded: Loaded) -> None:
    text = "Question: Zoe has 9 kites. Tomas has 4 times as many kites as Zoe."
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = register()(pretrained=loaded).loglikelihood_rolling(requests((text,), ("",)), True)
    assert whole[0] == pytest.approx(reference(loaded.towers, [1], ids).log_probability, abs=len(ids) * FLOAT32_OP)
    assert whole[1] == 0
    windowed = register()(pretrained=loaded, max_length=9).loglikelihood_rolling(requests((text,)), True)
    assert windowed[0] < 0 and windowed[0] != whole[0]


@needs_lm_eval
def test_empty_context_is_the_token_that_begins_documents(loaded: Loaded) -> None:
    answer = register()(pretrained=loaded).loglikelihood(requests(("", "Question")), True)
    ids = loaded.tokenizer("Question", add_special_tokens=False)["input_ids"]
    expected = reference(loaded.towers, [1], ids)
    assert answer[0][0] == pytest.approx(expected.log_probability, abs=len(ids) * FLOAT32_OP)


@needs_lm_eval
@pytest.mark.slow
def test_local_task_scores_ar_and_self_speculation_alike_and_choices_in_every_mode(loaded: Loaded) -> None:
    ar, diffusion, exact = (
        Task("trio_arithmetic", LOCAL_TASK).score(loaded, setting, batch_size=5)
        for setting in (
            ModeOptions(Mode.AR),
            ModeOptions(Mode.MASK_DIFFUSION, 8, 4),
            ModeOptions(Mode.SELF_SPECULATIVE),
        )
    )
    assert ar.metric == "exact_match,first-number" and ar.num_documents == 24 and ar.standard_error is not None
    assert ar.value > 0.6
    assert exact.value == ar.value
    assert 0 < diffusion.value <= ar.value
    choices = [Task("trio_arithmetic_choice", LOCAL_TASK, limit=7).score(loaded, ModeOptions(mode)) for mode in Mode]
    assert {one.value for one in choices} == {choices[0].value}
    assert choices[0].value > 0.8


@needs_lm_eval
@pytest.mark.slow
def test_command_hands_everything_to_the_harness(tmp_path: Path) -> None:
    arguments = ["--model", "twotower", "--tasks", "trio_arithmetic", "--include_path", str(LOCAL_TASK), "--limit", "5"]
    options = f"pretrained={trio_path('twotower')},mode=mask-diffusion,gamma=0.8,steps=4,block_size=8,dtype=float32"
    done = subprocess.run(
        [sys.executable, "-m", "twotower_spec.cli", "lm-eval", *arguments, "--model_args", options],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([*python_path(), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "|trio_arithmetic|" in done.stdout and "exact_match" in done.stdout


@needs_lm_eval
@pytest.mark.slow
def test_unknown_task_is_refused_with_its_name() -> None:
    with pytest.raises(ArgumentError, match="no-such-task"):
        Task("no-such-task", LOCAL_TASK).check()


def python_path() -> list[str]:
    return [str(ROOT / folder) for folder in (".", "kernels", "vllm_plugin")]
