"""The model `twotower` of lm-eval (EleutherAI's evaluation harness).

lm-eval looks for models in its own registry alone, so `register` has to be called in the process that evaluates:
`twotower-spec lm-eval` does that and hands everything else to lm-eval's command line. Importing this file needs no
lm-eval.

Source: lm_eval/api/model.py and lm_eval/models/huggingface.py, version 0.4.13.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import encode_texts, end_token_ids, load_tokenizer, resolve_checkpoint
from twotower_spec.config import TwoTowerConfig, check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.likelihood import log_likelihoods
from twotower_spec.extras import require_extra
from twotower_spec.generation.modes import MODES
from twotower_spec.generation.options import GenerationOptions, ModeOptions, as_mode
from twotower_spec.model import TwoTowerModel, as_dtype
from twotower_spec.reading import is_directory
from twotower_spec.towers.model import usable_device

logger = logging.getLogger(__name__)

NAME = "twotower"
DEFAULT_MAX_GEN_TOKS = 256
# What its command line gives a model when the user named no device.
LM_EVAL_DEVICE = "cuda:0"
# Spellings of the most new tokens among lm-eval's tasks, the first of which counts.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN_GENERATION_ARGUMENTS = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTH_NAMES}


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, where both are in memory already.

    Attributes:
        towers: the model.
        tokenizer: its tokenizer, whose end token ends documents.
        end_token_ids: ids that end texts, too.
    """

    towers: TwoTowerModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """A task's demands on one generation.

    Attributes:
        until: strings that end the text; they are not part of it.
        options: how it is generated; the ids that end it and the seeds are not in there yet.
    """

    until: tuple[str, ...]
    options: GenerationOptions


class TwoTowerTasks:
    """All methods that lm-eval calls on a model. `register` adds lm-eval's base class, whose interface this is.

    Text is generated in any mode. Likelihoods are the context tower's in every mode: the denoiser gives no probability
    of a text, and the published figures of multiple-choice tasks are those of the context tower, too.
    """

    backend = "causal"
    tokenizer_name = NAME
    cache_hook: Any
    rank: int

    def __init__(
        self,
        pretrained: str | Path | Loaded,
        mode: str = "mask-diffusion",
        gamma: float | None = None,
        steps: int | None = None,
        block_size: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        max_length: int | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        denoiser_device: str | None = None,
        dtype: str | None = None,
        denoiser_dtype: str | None = None,
        revision: str | None = None,
        **unknown: object,
    ) -> None:
        """Loads the checkpoint; all arguments can be given in `--model_args`.

        Args:
            pretrained: directory or hub id of a TwoTower checkpoint, or one that is loaded.
            mode: ar, mock-ar, mask-diffusion or self-speculative.
            gamma: confidence threshold; None for 0.8.
            steps: most denoising steps per block; None for the mode's default.
            block_size: tokens per block; None for the mode's default.
            temperature, top_k, top_p: in place of what tasks ask for; None leaves it to the task.
            seed: of the sampling noise; request i of a call uses `seed + i`, whatever the batch.
            max_gen_toks: most new tokens where the task does not say.
            max_length: most tokens of prompt and text; longer prompts lose their beginning. None for config.json's.
            batch_size: requests generated or scored together.
            max_batch_size: of lm-eval's automatic batch size, which is refused.
            device: of the context tower; None for cpu. lm-eval gives its default, cuda:0, everywhere: without any GPU
                that is cpu, and the log says so.
            denoiser_device: None for the same.
            dtype: of the weights; None for the one they are stored in.
            denoiser_dtype: None for the same.
            revision: branch, tag or commit of a hub id.
            unknown: refused.

        Raises:
            ArgumentError: an argument is not allowed, or the checkpoint has no tokenizer.
        """
        super().__init__()
        if unknown:
            raise ArgumentError(
                f"model argument {next(iter(unknown))!r} is not known; see docs/evaluation.md for those there are"
            )
        self.setting = ModeOptions(as_mode(mode), block_size, steps, gamma).without_idle_steps()
        check_integer("max_gen_toks", max_gen_toks, minimum=1)
        self.options = self.setting.complete(
            max_new_tokens=max_gen_toks, temperature=temperature or 0.0, top_k=top_k, top_p=top_p
        )
        if max_length is not None:
            check_integer("max_length", max_length, minimum=2)
        self.batch_size = _as_batch_size(batch_size)
        self.temperature, self.seed = temperature, seed
        if isinstance(pretrained, Loaded):
            self.towers, self.tokenizer = pretrained.towers, pretrained.tokenizer
            self.end_token_ids = pretrained.end_token_ids
        else:
            as_dtype(dtype)
            as_dtype(denoiser_dtype)
            context_device = _usable(device)
            usable_device(denoiser_device or context_device)
            directory = resolve_checkpoint(str(pretrained), revision)
            config = TwoTowerConfig.from_pretrained(directory)
            tokenizer = load_tokenizer(directory)
            if tokenizer is None or tokenizer.eos_token_id is None:
                raise ArgumentError(
                    f"{pretrained} has no tokenizer with an end-of-sequence token, and tasks are text; put "
                    f"tokenizer.json and tokenizer_config.json beside its weights"
                )
            self.tokenizer, self.tokenizer_name = tokenizer, str(directory)
            self.end_token_ids = end_token_ids(directory, tokenizer, config.vocab_size)
            self.towers = TwoTowerModel.from_pretrained(
                directory,
                towers="both" if MODES[self.setting.mode].needs_denoiser else "context",
                dtype=dtype,
                denoiser_dtype=denoiser_dtype,
                context_device=context_device,
                denoiser_device=denoiser_device,
            )
        self.max_length = max_length or self.towers.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The id that stands in for an empty context."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    def get_model_info(self) -> dict[str, Any]:
        """Facts that lm-eval writes beside its results."""
        return {"model_dtype": str(self.towers.dtype), "twotower_setting": asdict(self.setting)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt, by the tokenizer's template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, with special tokens where the tokenizer adds them by itself."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return encode_texts(self.tokenizer, [string], "text", **options)[0]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string of each request, or the end of the document."""
        texts = [""] * len(requests)
        alike: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
        for index, request in enumerate(requests):
            context, arguments = request.args
            ids = self.tok_encode(context) or [self.prefix_token_id]
            alike[json.dumps(arguments, sort_keys=True, default=str)].append((index, ids))
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc=self.setting.label) as bar:
            for rows in alike.values():
                wanted = self._generation_request(requests[rows[0][0]].args[1])
                # Batches of rows that are about equally long.
                rows.sort(key=lambda row: (-len(row[1]), row[0]))
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    prompts = [self._shorten(ids, self.max_length - wanted.options.max_new_tokens) for _, ids in batch]
                    seeds = [self.seed + index for index, _ in batch]
                    for (index, _), text in zip(batch, self._generate(prompts, wanted, seeds), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                        bar.update()
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; those longer than `max_length` are read in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            mine = [make_disjoint_window(window) for window in rolling]
            windows.extend(mine)
            owner.extend([index] * len(mine))
        totals = [0.0] * len(requests)
        with tqdm(total=len(windows), disable=disable_tqdm or self.rank != 0, desc="likelihood of texts") as bar:
            found = log_likelihoods(self.towers, windows, self.batch_size, bar.update)
        for index, likelihood in zip(owner, found, strict=True):
            totals[index] += likelihood.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Likelihood of encoded continuations; `loglikelihood` of lm-eval's base class calls it."""
        pairs = []
        for _texts, context, continuation in requests:
            kept = self._shorten(context or [self.prefix_token_id], self.max_length - len(continuation))
            pairs.append((kept, continuation))
        with tqdm(total=len(pairs), disable=disable_tqdm or self.rank != 0, desc="likelihood") as bar:
            found = log_likelihoods(self.towers, pairs, self.batch_size, bar.update)
        answers = [(likelihood.log_probability, likelihood.greedy) for likelihood in found]
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _shorten(self, ids: list[int], num_tokens: int) -> list[int]:
        """The last tokens, of which at least one stays."""
        if len(ids) <= max(num_tokens, 1):
            return ids
        logger.warning("a prompt of %d tokens is cut to its last %d, by max_length", len(ids), max(num_tokens, 1))
        return ids[-max(num_tokens, 1) :]

    def _generation_request(self, arguments: dict[str, Any]) -> GenerationRequest:
        """Reads a task's generation arguments; those given to the model take precedence."""
        for name in sorted(arguments.keys() - _KNOWN_GENERATION_ARGUMENTS):
            logger.warning("generation argument %s=%r of the task has no meaning here", name, arguments[name])
        until = arguments.get("until") or []
        lengths = [arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None]
        max_new_tokens = int(lengths[0]) if lengths else self.options.max_new_tokens
        if max_new_tokens >= self.max_length:
            raise ArgumentError(
                f"{max_new_tokens} new tokens leave no room for a prompt in max_length {self.max_length}; lower "
                f"max_gen_toks or raise max_length"
            )
        temperature = float(arguments.get("temperature") or 0.0)
        if not arguments.get("do_sample", temperature > 0):
            temperature = 0.0
        return GenerationRequest(
            until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            options=replace(
                self.options,
                max_new_tokens=max_new_tokens,
                temperature=temperature if self.temperature is None else self.temperature,
                top_k=arguments.get("top_k") if self.options.top_k is None else self.options.top_k,
                top_p=arguments.get("top_p") if self.options.top_p is None else self.options.top_p,
            ),
        )

    def _generate(self, prompts: list[list[int]], wanted: GenerationRequest, seeds: list[int]) -> list[str]:
        """Generates the texts of one batch, until every row has met its end."""
        # Stop strings that are special tokens are left out of decoded text, and so are met as ids.
        added = self.tokenizer.added_tokens_decoder.items()
        ends = {
            self.eot_token_id,
            *self.end_token_ids,
            *(i for i, token in added if token.special and token.content in wanted.until),
        }
        tokens: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        ended: set[int] = set()
        for block in self.towers.stream(prompts, replace(wanted.options, eos_token_id=ends, seed=seeds)):
            if block.row in ended:
                continue
            tokens[block.row].extend(block.token_ids)
            kept = up_to_first(tokens[block.row], ends)
            text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
            texts[block.row] = before_first(text, wanted.until)
            if block.finished or len(texts[block.row]) < len(text):
                ended.add(block.row)
                if len(ended) == len(prompts):
                    break
        return texts


@cache
def register() -> type[Any]:
    """Makes `twotower` known to lm-eval in this process, and gives the class.

    Raises:
        ArgumentError: lm-eval is not installed.
    """
    require_extra("eval", "lm_eval")
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    @register_model(NAME)
    class TwoTowerLM(TwoTowerTasks, TemplateLM):
        """`TwoTowerTasks` as lm-eval knows models."""

    return TwoTowerLM


@dataclass(frozen=True)
class TaskScore:
    """Score of one setting on one task of lm-eval.

    Attributes:
        task: its name.
        metric: the task's first one, with its filter: `exact_match,strict-match`.
        value: mean over the documents.
        standard_error: of the mean; None where lm-eval has none.
        num_documents: documents that were evaluated.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    num_documents: int


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, and how it is run; methods raise an `ArgumentError` where lm-eval is not installed.

    Attributes:
        name: that lm-eval knows it by.
        include_path: folder with tasks of your own.
        num_fewshot: solved examples in the prompt; None for the task's own number.
        limit: most documents; None for all.
    """

    name: str
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuses a task that lm-eval does not know, and numbers that are not allowed."""
        for name, value, minimum in (("--num-fewshot", self.num_fewshot, 0), ("--limit", self.limit, 1)):
            if value is not None:
                check_integer(name, value, minimum=minimum)
        require_extra("eval", "lm_eval")
        folder = self.include_path
        if folder is not None and not is_directory(folder):
            raise ArgumentError(f"the folder of tasks {folder} is not there; give a folder with a YAML file")
        if self.name not in _task_manager(folder).all_tasks:
            raise ArgumentError(
                f"lm-eval has no task {self.name!r}; see `lm-eval ls tasks`, or name the folder of your own"
            )

    def score(self, loaded: Loaded, setting: ModeOptions, batch_size: int = 1) -> TaskScore:
        """Evaluates one setting, with so many requests generated together."""
        model_class = register()
        from lm_eval import simple_evaluate

        model = model_class(
            pretrained=loaded,
            mode=setting.mode,
            gamma=setting.confidence_threshold,
            steps=setting.steps_per_block,
            block_size=setting.block_size,
            batch_size=batch_size,
        )
        results = simple_evaluate(
            model=model,
            tasks=[self.name],
            task_manager=_task_manager(self.include_path),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            bootstrap_iters=100,  # for the few metrics whose error has no formula
            log_samples=False,
        )
        return _first_metric(self.name, results)

    def to_json(self) -> dict[str, Any]:
        """JSON that is equal where scores are comparable."""
        path = str(self.include_path.resolve()) if self.include_path else None
        return {**asdict(self), "include_path": path}


@cache
def _task_manager(include_path: Path | None) -> Any:
    """All tasks there are; lm-eval reads thousands of files for it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path) if include_path else None)


def _first_metric(task: str, results: dict[str, Any]) -> TaskScore:
    values = results["results"][task]
    metrics = [name for name in values if "," in name and not name.partition(",")[0].endswith("_stderr")]
    name, filtered_by = metrics[0].split(",", 1)
    error = values.get(f"{name}_stderr,{filtered_by}")
    samples = results.get("n-samples", {})
    return TaskScore(
        task=task,
        metric=metrics[0],
        value=float(values[metrics[0]]),
        standard_error=float(error) if isinstance(error, int | float) else None,
        num_documents=sum(count["effective"] for count in samples.values()),
    )


def up_to_first(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens before the first one that ends the document."""
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def before_first(text: str, stops: Sequence[str]) -> str:
    """Text before the first of some strings."""
    found = [text.find(stop) for stop in stops]
    return text[: min((at for at in found if at >= 0), default=len(text))]


def _usable(device: str | None) -> str:
    if device == LM_EVAL_DEVICE and not torch.cuda.is_available():
        logger.warning("this machine has no %s, which is lm-eval's default device; using cpu", device)
        return "cpu"
    return str(usable_device(device or "cpu"))


def _as_batch_size(batch_size: int | str | None) -> int:
    value: object = 1 if batch_size is None else batch_size
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, str):
        raise ArgumentError(f"batch_size {value!r} is not supported; give a number")
    check_integer("batch_size", value, minimum=1)
    assert isinstance(value, int)
    return value
