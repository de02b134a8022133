"""Verifiers of the Nemotron-H layout with random weights, as small as vLLM takes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, VOCABULARY = 64, 512
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 32
MAMBA_HEADS, MAMBA_HEAD_DIM, NUM_GROUPS, STATE_SIZE, KERNEL = 4, 16, 2, 16, 4
NUM_EXPERTS, EXPERT_WIDTH, SHARED_WIDTH, MLP_WIDTH = 4, 48, 64, 96
MTP_NORMS = ("enorm", "hnorm", "final_layernorm")


def save_nemotron_h(
    folder: Path,
    pattern: str = "M*EM-M*E",
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
    with_mtp: bool = False,
) -> Path:
    """Writes a checkpoint of Mamba-2 (M), attention (*), experts (E) and MLPs (-), and returns its folder.

    The weights are large enough that texts do not repeat themselves. An MTP layer is one of attention.
    """
    generator = torch.Generator().manual_seed(len(pattern))

    def normal(*shape: int, std: float | None = None, mean: float = 0.0) -> Tensor:
        scale = shape[-1] ** -0.5 if std is None else std
        return mean + scale * torch.randn(*shape, generator=generator)

    tensors = {
        "backbone.embeddings.weight": normal(vocabulary, HIDDEN, std=1.0),
        "backbone.norm_f.weight": normal(HIDDEN, std=0.1, mean=1.0),
        "lm_head.weight": normal(vocabulary, HIDDEN, std=0.5),
    }
    inner = MAMBA_HEADS * MAMBA_HEAD_DIM
    channels = inner + 2 * NUM_GROUPS * STATE_SIZE
    places = [(f"backbone.layers.{index}", kind) for index, kind in enumerate(pattern)]
    for place, kind in [*places, *([("mtp.layers.0", "*")] if with_mtp else [])]:
        layer = {"norm.weight": normal(HIDDEN, std=0.1, mean=1.0)}
        if place == "mtp.layers.0":
            layer |= {f"{name}.weight": normal(HIDDEN, std=0.1, mean=1.0) for name in MTP_NORMS}
            layer["eh_proj.weight"] = normal(HIDDEN, 2 * HIDDEN)
        match kind:
            case "M":
                layer |= {
                    "mixer.in_proj.weight": normal(inner + channels + MAMBA_HEADS, HIDDEN),
                    "mixer.conv1d.weight": normal(channels, 1, KERNEL, std=0.5),
                    "mixer.conv1d.bias": normal(channels, std=0.1),
                    "mixer.A_log": (0.2 + 4 * torch.rand(MAMBA_HEADS, generator=generator)).log(),
                    "mixer.D": normal(MAMBA_HEADS, std=0.2, mean=1.0),
                    "mixer.dt_bias": normal(MAMBA_HEADS, std=0.5, mean=-1.0),
                    "mixer.norm.weight": normal(inner, std=0.1, mean=1.0),
                    "mixer.out_proj.weight": normal(HIDDEN, inner),
                }
            case "*":
                for name, heads in (("q", NUM_HEADS), ("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS)):
                    layer[f"mixer.{name}_proj.weight"] = normal(heads * HEAD_DIM, HIDDEN)
                layer["mixer.o_proj.weight"] = normal(HIDDEN, NUM_HEADS * HEAD_DIM)
            case "E":
                layer["mixer.gate.weight"] = normal(NUM_EXPERTS, HIDDEN)
                layer["mixer.gate.e_score_correction_bias"] = normal(NUM_EXPERTS, std=0.1)
                for expert in range(NUM_EXPERTS):
                    layer[f"mixer.experts.{expert}.up_proj.weight"] = normal(EXPERT_WIDTH, HIDDEN)
                    layer[f"mixer.experts.{expert}.down_proj.weight"] = normal(HIDDEN, EXPERT_WIDTH)
                layer["mixer.shared_experts.up_proj.weight"] = normal(SHARED_WIDTH, HIDDEN)
                layer["mixer.shared_experts.down_proj.weight"] = normal(HIDDEN, SHARED_WIDTH)
            case "-":
                layer["mixer.up_proj.weight"] = normal(MLP_WIDTH, HIDDEN)
                layer["mixer.down_proj.weight"] = normal(HIDDEN, MLP_WIDTH)
        tensors |= {f"{place}.{name}": tensor for name, tensor in layer.items()}
    folder.mkdir(parents=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    mtp = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*"} if with_mtp else {}
    (folder / "config.json").write_text(json.dumps(_config(pattern, dtype, vocabulary) | mtp))
    return folder


def _config(pattern: str, dtype: torch.dtype, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "mamba_num_heads": MAMBA_HEADS,
        "mamba_head_dim": MAMBA_HEAD_DIM,
        "n_groups": NUM_GROUPS,
        "ssm_state_size": STATE_SIZE,
        "conv_kernel": KERNEL,
        "chunk_size": 8,
        "intermediate_size": MLP_WIDTH,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "moe_shared_expert_intermediate_size": SHARED_WIDTH,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "max_position_embeddings": 8192,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
