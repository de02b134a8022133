"""The context tower of a TwoTower checkpoint, loaded by vLLM as the Nemotron-H model that it is."""

from __future__ import annotations

from dataclasses import replace

from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM

# What only the denoiser has. Its head is called as vLLM calls the one head of a model.
DENOISER = ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")


class NemotronHTwoTowerForCausalLM(NemotronHForCausalLM):
    """vLLM's Nemotron-H model, which takes the context tower's tensors of a TwoTower checkpoint by their names."""

    hf_to_vllm_mapper = replace(
        NemotronHForCausalLM.hf_to_vllm_mapper,
        # Applied in this order: the denoiser's head goes before the context tower's takes its name.
        orig_to_new_prefix={
            **dict.fromkeys(DENOISER),
            "context_lm_head.": "lm_head.",
            "context_tower.": "model.",
        },
    )

    @staticmethod
    def is_unused_checkpoint_weight(name: str) -> bool:
        """Whether a tensor is the denoiser's: vLLM opens no file that holds nothing else."""
        return name.startswith(DENOISER)
