"""Configuration of the model and of block diffusion: frozen, validated once, documented per field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from twotower_kernels.experts import FOUR_BITS
from twotower_spec.errors import ArgumentError, ConfigError, FileError, first_line
from twotower_spec.reading import is_directory, is_file, read_json

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
DEFAULT_MASK_TOKEN_ID = 3

# No dimension is larger, and no model deeper.
MOST, MOST_LAYERS = 1 << 32, 1024

MAMBA, ATTENTION, MOE, MLP = "M", "*", "E", "-"
LAYER_LETTERS = {MAMBA: "Mamba-2", ATTENTION: "attention", MOE: "mixture of experts", MLP: "dense MLP"}
STATELESS_LAYERS = (MOE, MLP)

DTYPE_FIELDS = ("torch_dtype", "dtype")
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Dtypes that routed experts may be quantised to, and what holds them.
EXPERT_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8, "int4": FOUR_BITS}


@dataclass(frozen=True)
class TwoTowerConfig:
    """Geometry of both towers, under the field names of the published config.json.

    Fields without a default must be present in config.json. Fields the model does not read are kept in
    `unknown_fields` and written back by `to_dict`.

    Raises:
        ConfigError: a field is missing, has the wrong type, contradicts another one, or asks for something
            that this implementation does not compute.

    Source: config.json and configuration_nemotron_h.py of the published checkpoint.
    """

    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Layers of each tower."""
    vocab_size: int
    """Rows of the embedding tables and of the heads."""
    hybrid_override_pattern: str
    """One letter per layer: `M` Mamba-2, `*` attention, `E` mixture of experts, `-` dense MLP."""
    num_attention_heads: int
    """Query heads of an attention layer."""
    num_key_value_heads: int
    """Key/value heads of an attention layer; divides `num_attention_heads`."""
    head_dim: int
    """Width of an attention head; `num_attention_heads * head_dim` need not equal `hidden_size`."""
    mamba_num_heads: int
    """Heads of a Mamba-2 layer."""
    mamba_head_dim: int
    """Channels of a Mamba-2 head."""
    n_groups: int
    """Groups that share B and C, and channels groups of the gated norm; divides `mamba_num_heads`."""
    ssm_state_size: int
    """State size N of a Mamba-2 channel."""
    conv_kernel: int
    """Taps of the depthwise causal convolution, the current token included."""
    n_routed_experts: int = 0
    """Routed experts of an `E` layer."""
    num_experts_per_tok: int = 0
    """Routed experts that one token visits."""
    moe_intermediate_size: int = 0
    """Width of a routed expert."""
    moe_shared_expert_intermediate_size: int = 0
    """Width of the shared expert, whatever `n_shared_experts` says."""
    n_group: int = 1
    """Groups of consecutive experts for group-limited routing."""
    topk_group: int = 1
    """Expert groups that stay eligible for one token."""
    norm_topk_prob: bool = True
    """Divide the weights of the chosen experts by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the routed experts."""
    intermediate_size: int = 0
    """Width of a dense MLP layer (`-`)."""
    norm_eps: float = 1e-5
    """Epsilon of every RMS norm (also spelled `layer_norm_epsilon`)."""
    use_conv_bias: bool = True
    """Whether the convolution has a bias."""
    residual_in_fp32: bool = False
    """Keep the residual stream in float32 when weights are narrower."""
    bos_token_id: int | None = 1
    """First token of a sequence, if the tokenizer adds one."""
    eos_token_id: int | tuple[int, ...] | None = 2
    """End of sequence; generation stops only at ids it is given explicitly."""
    pad_token_id: int | None = 0
    """Padding; never fed to the towers."""
    mask_token_id: int = DEFAULT_MASK_TOKEN_ID
    """Stands for "not decided yet" in a block; not part of the published config.json."""
    experts_dtype: str | None = None
    """Dtype that routed experts are quantised to: of 8 bits, with a scale per output channel, or int4, with one per 64
    inputs. None for the dtype of all weights. Not part of the published config.json."""
    max_position_embeddings: int = 262144
    """Longest context the model was trained for; there is no positional encoding, so nothing depends on it."""
    torch_dtype: str | None = None
    """Dtype the checkpoint was saved in (also spelled `dtype`, or with `torch.`); None, like `auto`, if not said."""
    unknown_fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Every other field of config.json, untouched."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_geometry(self)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> TwoTowerConfig:
        """Reads config.json of a checkpoint.

        Args:
            name_or_path: a directory with config.json, or a hub id.
            revision: branch, tag or commit of a hub id.

        Raises:
            ConfigError: no readable config.json there, or its content is refused.
        """
        directory = Path(name_or_path)
        if is_directory(directory) and not is_file(directory / "config.json"):
            raise ConfigError(f"{directory} has no config.json; give the directory of a TwoTower checkpoint")
        return cls.from_dict(read_config(name_or_path, revision))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TwoTowerConfig:
        """Builds the configuration from the content of a config.json.

        Raises:
            ConfigError: see the class.
        """
        _check_architecture(raw)
        _check_unsupported(raw)
        raw = {name: _dtype_name(value) if name in DTYPE_FIELDS else value for name, value in raw.items()}
        known = {f.name: f for f in fields(cls) if f.name != "unknown_fields"}
        values = {name: value for name, value in raw.items() if name in known}
        unknown = {name: value for name, value in raw.items() if name not in known}
        for name, alias in (("norm_eps", "layer_norm_epsilon"), ("torch_dtype", "dtype")):
            if alias in raw:
                if raw[alias] is None:  # says nothing
                    continue
                if raw.get(name) is not None and raw[name] != raw[alias]:
                    raise ConfigError(
                        f"config.json contradicts itself: {name} is {raw[name]!r} but {alias} is {raw[alias]!r}; "
                        f"they name the same thing, keep one value"
                    )
                values[name] = raw[alias]
        missing = sorted(n for n, f in known.items() if n not in values and _is_required(f))
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; add the values the checkpoint was made with")
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**values, unknown_fields=unknown)

    def to_dict(self) -> dict[str, Any]:
        """Content for a config.json: published names, unknown fields included."""
        content = dict(self.unknown_fields)
        for f in fields(self):
            if f.name != "unknown_fields":
                value = getattr(self, f.name)
                content[f.name] = list(value) if isinstance(value, tuple) else value
        if content["mask_token_id"] == DEFAULT_MASK_TOKEN_ID:
            del content["mask_token_id"]
        if content["experts_dtype"] is None:
            del content["experts_dtype"]
        if "dtype" in content:
            content["dtype"] = content.pop("torch_dtype")
        content.setdefault("architectures", [ARCHITECTURE])
        content.setdefault("model_type", "nemotron_h")
        return dict(sorted(content.items()))

    def to_json(self) -> str:
        """The text of config.json, in the published layout (an infinite time step limit stays `Infinity`)."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def replace(self, **changes: Any) -> TwoTowerConfig:
        """Copies the configuration with some fields changed, and validates it again."""
        return replace(self, **changes)

    def with_experts_per_token(self, experts_per_token: int | None) -> TwoTowerConfig:
        """Copies the configuration for tokens that visit fewer experts; None for as many as it says.

        Raises:
            ArgumentError: there are no experts, or a token visits fewer already.
        """
        if experts_per_token is None:
            return self
        if MOE not in self.layer_kinds:
            raise ArgumentError(
                f"experts_per_token {experts_per_token!r} is not allowed, the model has no experts; leave it out"
            )
        check_integer("experts_per_token", experts_per_token, minimum=1, maximum=self.num_experts_per_tok)
        return self.replace(num_experts_per_tok=experts_per_token)

    def with_experts_dtype(self, experts_dtype: str | None) -> TwoTowerConfig:
        """Copies the configuration for experts that are quantised while they are read; None for as they are stored.

        Raises:
            ArgumentError: the dtype is unknown, there are no experts, or they are quantised otherwise already.
        """
        if experts_dtype is None:
            return self
        check_experts_dtype(experts_dtype)
        if MOE not in self.layer_kinds:
            raise ArgumentError(
                f"experts_dtype {experts_dtype!r} is not allowed, the model has no experts; leave it out"
            )
        if self.experts_dtype not in (None, experts_dtype):
            raise ArgumentError(
                f"experts_dtype {experts_dtype!r} is not allowed, experts are stored in {self.experts_dtype}; leave it "
                f"out, or give the checkpoint that they were made from"
            )
        return self.replace(experts_dtype=experts_dtype)

    @property
    def layer_kinds(self) -> str:
        """One letter per layer, the same as `hybrid_override_pattern`."""
        return self.hybrid_override_pattern

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """Indices of the Mamba-2 layers."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == MAMBA)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == ATTENTION)

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba-2 layer (not `expand * hidden_size`)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def d_conv_channels(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def dtype(self) -> torch.dtype | None:
        """The saved dtype, if config.json names one."""
        return TORCH_DTYPES[self.torch_dtype] if self.torch_dtype else None

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token of one request occupies in all attention layers."""
        return len(self.attention_layers) * 2 * self.num_key_value_heads * self.head_dim * dtype.itemsize

    def mamba_bytes_per_request(self, dtype: torch.dtype) -> int:
        """Bytes of convolution history (in `dtype`) and SSM state (float32, float64 for float64) of one request."""
        conv = self.d_conv_channels * (self.conv_kernel - 1) * dtype.itemsize
        ssm = self.d_inner * self.ssm_state_size * accumulation_dtype(dtype).itemsize
        return len(self.mamba_layers) * (conv + ssm)


def read_config(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The content of the config.json of any model.

    Args:
        name_or_path: a directory with config.json, or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConfigError: there is none that can be read, or it holds no JSON object.
    """
    try:
        file = cached_file(str(name_or_path), "config.json", revision=revision)
        raw = read_json(Path(str(file)), remedy="download it again")
    except FileError as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"no readable config.json at {str(name_or_path)!r} ({reason}); "
            f"give a checkpoint directory or a hub id that can be reached"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config.json at {str(name_or_path)!r} holds no JSON object; download it again")
    return raw


@dataclass(frozen=True)
class DiffusionConfig:
    """Schedule by which a block is denoised. Defaults are those of the published `generate_mask_diffusion`.

    Raises:
        ArgumentError: a value is out of range.
    """

    block_size: int = 16
    """Tokens per diffusion block."""
    steps_per_block: int = 16
    """Most denoising steps for one block."""
    confidence_threshold: float = 0.9
    """A pick whose probability is greater than this is committed; the model card recommends 0.8."""
    temperature: float = 0.0
    """0 picks the most probable token; above, picks are sampled from `logits / temperature`."""
    top_k: int | None = None
    """Sample among the k most probable tokens only; `None` or 0 for all."""
    top_p: float | None = None
    """Sample among the most probable tokens that together reach this probability; `None` or 1 for all."""
    mask_token_id: int = DEFAULT_MASK_TOKEN_ID
    """Id that stands for a masked position."""

    def __post_init__(self) -> None:
        check_schedule(self.block_size, self.steps_per_block, self.confidence_threshold)
        check_integer("mask_token_id", self.mask_token_id, minimum=0)
        check_sampling(self.temperature, self.top_k, self.top_p)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, scans and softmax for weights of `dtype`: float32, or float64 when weights are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Refuses anything but an integer of at least `minimum`, and of at most `maximum` where there is one.

    Raises:
        ArgumentError: with the name and value.
    """
    too_large = maximum is not None and isinstance(value, int) and value > maximum
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum or too_large:
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ArgumentError(f"{name} {value!r} is not allowed; give an integer {allowed}")


def check_experts_dtype(experts_dtype: object) -> None:
    """Refuses a dtype that experts are not quantised to; None stands for none.

    Raises:
        ArgumentError: with the value.
    """
    if experts_dtype is not None and experts_dtype not in list(EXPERT_DTYPES):  # a list takes any type
        raise ArgumentError(f"experts_dtype {experts_dtype!r} is not allowed; give one of {', '.join(EXPERT_DTYPES)}")


def check_schedule(block_size: int, steps_per_block: int, confidence_threshold: float) -> None:
    """Refuses a denoising schedule that is out of range.

    Raises:
        ArgumentError: with the name and value.
    """
    check_integer("block_size", block_size, minimum=1)
    check_integer("steps_per_block", steps_per_block, minimum=1)
    if not _is_number(confidence_threshold) or not 0.0 <= confidence_threshold <= 1.0:
        raise ArgumentError(
            f"confidence_threshold {confidence_threshold!r} is not a probability; give a number from 0 to 1"
        )


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None) -> None:
    """Refuses sampling parameters that are out of range.

    Raises:
        ArgumentError: with the name and value.
    """
    if not _is_number(temperature) or temperature < 0:
        raise ArgumentError(f"temperature {temperature!r} is not allowed; give 0 for greedy or a positive number")
    if top_k is not None:
        check_integer("top_k", top_k, minimum=0)
    if top_p is not None and (not _is_number(top_p) or not 0.0 < top_p <= 1.0):
        raise ArgumentError(f"top_p {top_p!r} is not allowed; give a number above 0 and at most 1")
    if min_p is not None and (not _is_number(min_p) or not 0.0 <= min_p <= 1.0):
        raise ArgumentError(f"min_p {min_p!r} is not allowed; give a number from 0 to 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def architectures_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the architectures in a config.json; none where it names none.

    Raises:
        ConfigError: they are no list of names.
    """
    named = raw.get("architectures") or ()
    if not isinstance(named, list | tuple) or not all(isinstance(one, str) for one in named):
        raise ConfigError(
            f"architectures {named!r} in config.json is no list of names; give what its model was saved with"
        )
    return tuple(named)


def _check_architecture(raw: Mapping[str, Any]) -> None:
    architectures = architectures_of(raw) or (ARCHITECTURE,)
    if ARCHITECTURE not in architectures:
        raise ConfigError(
            f"architectures {list(architectures)} is not a TwoTower checkpoint; config.json must name {ARCHITECTURE}"
        )


_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "tie_word_embeddings": (False,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "quantization_config": (None, {}),
}


def _check_unsupported(raw: Mapping[str, Any]) -> None:
    for name, allowed in _ONLY_SUPPORTED.items():
        if name in raw and raw[name] not in allowed:
            raise ConfigError(
                f"{name} {raw[name]!r} is not supported; TwoTower checkpoints are published with {allowed[0]!r}"
            )
    limit = raw.get("time_step_limit")
    pair = limit if isinstance(limit, list | tuple) and len(limit) == 2 else (math.nan, math.nan)
    if limit is not None and not (_as_float(pair[0]) <= 0.0 and _as_float(pair[1]) == math.inf):
        raise ConfigError(f"time_step_limit {limit!r} is not supported; the time step is not clamped: [0.0, Infinity]")


def _as_float(value: Any) -> float:
    if isinstance(value, Mapping):  # how newer transformers write an infinite float
        value = next(iter(value.values()), None)
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _dtype_name(value: Any) -> Any:
    """The bare name of a dtype; `auto` names none."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return None if name == "auto" else name


def _check_types(config: TwoTowerConfig) -> None:
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    for f in fields(config):
        allowed = kinds.get(str(f.type))
        value = getattr(config, f.name)
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and f.type != "bool")):
            raise ConfigError(f"{f.name} {value!r} is of the wrong type; config.json needs {f.type}")
        if f.type in ("int", "float") and not abs(value) < MOST:
            raise ConfigError(f"{f.name} {value!r} is too large; it must be below {MOST}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, tuple) and name == "eos_token_id" else (value,):
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise ConfigError(f"{name} {value!r} is of the wrong type; config.json needs a token id")
    if config.torch_dtype is not None and config.torch_dtype not in list(TORCH_DTYPES):  # a list takes any type
        raise ConfigError(f"torch_dtype {config.torch_dtype!r} is not supported; allowed are {', '.join(TORCH_DTYPES)}")
    try:
        check_experts_dtype(config.experts_dtype)
    except ArgumentError as error:
        raise ConfigError(str(error)) from error
    for name in ("hidden_size", "moe_intermediate_size") if config.experts_dtype == "int4" else ():
        if getattr(config, name) % 2:
            raise ConfigError(
                f"{name} {getattr(config, name)} is odd, a byte of experts_dtype 'int4' holds two inputs; give 'int8'"
            )


def _check_geometry(config: TwoTowerConfig) -> None:
    pattern = config.hybrid_override_pattern
    for letter in pattern:
        if letter not in LAYER_LETTERS:
            known = ", ".join(f"{k} ({v})" for k, v in LAYER_LETTERS.items())
            raise ConfigError(f"hybrid_override_pattern has the unknown layer letter {letter!r}; allowed are {known}")
    if config.num_hidden_layers > MOST_LAYERS:
        raise ConfigError(f"num_hidden_layers {config.num_hidden_layers} is not allowed; give {MOST_LAYERS} at most")
    if len(pattern) != config.num_hidden_layers:
        raise ConfigError(
            f"hybrid_override_pattern has {len(pattern)} letters but num_hidden_layers is {config.num_hidden_layers}; "
            f"they must agree"
        )
    positive = ["hidden_size", "num_hidden_layers", "vocab_size"]
    positive += ["num_attention_heads", "num_key_value_heads", "head_dim"] if ATTENTION in pattern else []
    if MAMBA in pattern:
        positive += ["mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"]
    if MOE in pattern:
        positive += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"]
        positive += ["moe_shared_expert_intermediate_size", "n_group", "topk_group"]
    positive += ["intermediate_size"] if MLP in pattern else []
    for name in positive:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} {getattr(config, name)} is not allowed; this layer pattern needs at least 1")
    if not config.norm_eps > 0:
        raise ConfigError(f"norm_eps {config.norm_eps} is not allowed; it must be above 0")
    if ATTENTION in pattern:
        _check_divides(config, "num_attention_heads", "num_key_value_heads")
    if MAMBA in pattern:
        _check_divides(config, "mamba_num_heads", "n_groups")
    if MOE in pattern:
        _check_divides(config, "n_routed_experts", "n_group")
        if config.topk_group > config.n_group:
            raise ConfigError(f"topk_group {config.topk_group} is greater than n_group {config.n_group}; lower it")
        eligible = config.n_routed_experts // config.n_group * config.topk_group
        if config.num_experts_per_tok > eligible:
            raise ConfigError(
                f"num_experts_per_tok {config.num_experts_per_tok} is greater than the {eligible} experts that routing "
                f"leaves eligible (n_routed_experts {config.n_routed_experts}, topk_group {config.topk_group} of "
                f"n_group {config.n_group}); lower it"
            )
        if config.n_group > 1 and config.n_routed_experts // config.n_group < 2:
            raise ConfigError(
                f"n_group {config.n_group} leaves one expert per group (n_routed_experts {config.n_routed_experts}); "
                f"a group is scored by its two best experts and needs at least 2"
            )
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise ConfigError(
            f"mask_token_id {config.mask_token_id} is outside the vocabulary; allowed are 0 to {config.vocab_size - 1}"
        )


def _check_divides(config: TwoTowerConfig, whole: str, part: str) -> None:
    if getattr(config, part) > 0 and getattr(config, whole) % getattr(config, part):
        raise ConfigError(
            f"{part} {getattr(config, part)} does not divide {whole} {getattr(config, whole)}; heads and experts are "
            f"shared out evenly"
        )
