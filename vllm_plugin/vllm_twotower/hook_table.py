"""Every place of vLLM that this plugin touches, as data.

The table has two readers. `vllm_twotower.compat` asks the vLLM that is installed, by importing it, so that a version
which has changed costs one warning instead of a server that dies at its first request. `vllm_twotower.check_wheel` asks
the sources in a wheel that is not installed. Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from vllm_twotower.sampling_parameters import OF_REQUESTS, OF_STEPS, names

# Where a hook acts: in every process that reads engine arguments or requests, where the verifier is a TwoTower
# checkpoint, in the workers of vLLM's model runner V1, there where the verifier has Mamba layers or is the drafter's
# own context tower, in those of V2, or in benchmarks, whose table is in `twotower_bench.vllm_hooks`.
Stage = Literal["routing", "model", "v1", "hybrid", "own state", "v2", "measuring"]


class Kind(StrEnum):
    """Kind of a hook, which decides how its presence is checked."""

    FUNCTION = "function"  # a function or method, with the parameters that we pass or that vLLM passes to ours
    FIELD = "field"  # annotated or defined in the class body, or assigned on self in one of its methods
    NAME = "name"  # bound in the module by whatever means, an import included; we replace it there
    CHOICE = "choice"  # values that the Literal type of a field allows
    KNOWN = "known"  # a class whose annotated fields are known to us, all of them


@dataclass(frozen=True)
class Need:
    """Need that some hooks serve.

    Attributes:
        purpose: what is lost without them, as a phrase that can follow "needed for".
        stage: the part of the plugin that touches them.
        required: whether drafting is impossible without them; otherwise their absence costs only the purpose.
        cpu_only: whether they are touched on a CPU only.
    """

    purpose: str
    stage: Stage
    required: bool = True
    cpu_only: bool = False


@dataclass(frozen=True)
class Hook:
    """One place of vLLM that the plugin wraps, replaces, calls or reads.

    Attributes:
        module: full name of the module, `vllm.engine.arg_utils`.
        name: name in it, with its class where it has one: `EngineArgs.create_speculative_config`.
        kind: what it is.
        need: what it is for.
        parameters: for a function its leading parameters in order, without self, () if any will do; for a choice the
            values that must be allowed; for a class the fields that it may have.
    """

    module: str
    name: str
    kind: Kind
    need: Need
    parameters: tuple[str, ...] = ()


def function(module: str, name: str, need: Need, parameters: str = "") -> Hook:
    """A function or method with these leading parameters, separated by spaces."""
    return Hook(module, name, Kind.FUNCTION, need, tuple(parameters.split()))


def fields(module: str, owner: str, names: str, need: Need) -> tuple[Hook, ...]:
    """One hook for each of the fields of a class, separated by spaces."""
    return tuple(Hook(module, f"{owner}.{name}", Kind.FIELD, need) for name in names.split())


ROUTING = Need("routing TwoTower checkpoints to the drafter", "routing")
ALIAS = Need("the command-line option --speculative-model", "routing", required=False)
MORE_PARAMETERS = Need("requests with min_p or logit_bias", "routing", required=False)
SEVERAL_SERVERS = Need("the drafter's numbers on /metrics of several API servers", "routing", required=False)
ITSELF = Need("a TwoTower checkpoint as the verifier", "model", required=False)
ITSELF_ON_CPU = Need("a TwoTower checkpoint as the verifier on a CPU", "model", required=False, cpu_only=True)
KNOWING = Need("requests that set sampling parameters which twotower-spec does not know", "v1", required=False)
LOADING = Need("loading the drafter", "v1")
STEP = Need("giving the drafter the requests of a step", "v1")
LAST_TOKENS = Need("drafting up to the last tokens of the longest allowed sequence", "v1", required=False)
VERIFYING = Need("verifying drafts", "v1")
CPU_SAMPLING = Need("correct sampling on a CPU", "v1", cpu_only=True)
HYBRID = Need("drafting for a verifier with Mamba layers", "hybrid", required=False)
HYBRID_ON_CPU = Need("a verifier with Mamba layers on a CPU", "hybrid", required=False, cpu_only=True)
OWN_STATE = Need("drafting from the verifier's own state", "own state", required=False)
ON_V2 = Need("drafting on model runner V2", "v2", required=False)

ARG_UTILS = "vllm.engine.arg_utils"
SAMPLING_PARAMS = "vllm.sampling_params"
SCHEDULER = "vllm.v1.core.sched.scheduler"
SCHEDULER_OUTPUT = "vllm.v1.core.sched.output"
SPECULATIVE = "vllm.config.speculative"
RUNNER = "vllm.v1.worker.gpu_model_runner"
INPUT_BATCH = "vllm.v1.worker.gpu_input_batch"
REJECTION_SAMPLER = "vllm.v1.sample.rejection_sampler"
SAMPLER = "vllm.v1.sample.sampler"
SAMPLING_METADATA = "vllm.v1.sample.metadata"
LOGITS_PROCESSORS = "vllm.v1.sample.logits_processor.state"
THINKING_BUDGETS = "vllm.v1.sample.thinking_budget_state"
OUTPUTS = "vllm.v1.outputs"
CUSTOM_CLASS = "vllm.v1.spec_decode.custom_class_proposer"
DRAFT_METADATA = "vllm.v1.spec_decode.metadata"
MAMBA_UTILS = "vllm.v1.worker.mamba_utils"
BLOCK_TABLE = "vllm.v1.worker.block_table"
KV_CACHE = "vllm.v1.kv_cache_interface"
ATTENTION = "vllm.model_executor.layers.attention.attention"
MAMBA_MIXER = "vllm.model_executor.layers.mamba.mamba_mixer2"
STATE_UPDATE = "vllm.model_executor.layers.mamba.ops.ssu_dispatch"
MODELS = "vllm.model_executor.models.registry"
MODEL_SETTINGS = "vllm.model_executor.models.config"
MODEL_PARTS = "vllm.model_executor.models.utils"
MODEL_CONFIGURATION = "vllm.transformers_utils.config"
NEMOTRON_H = "vllm.model_executor.models.nemotron_h"
# Of model runner V2.
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
SPECULATORS = "vllm.v1.worker.gpu.spec_decode"
REJECTION_SAMPLER_V2 = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
SAMPLER_V2 = "vllm.v1.worker.gpu.sample.sampler"
SAMPLING_STATES = "vllm.v1.worker.gpu.sample.states"
LOGPROBS_V2 = "vllm.v1.worker.gpu.sample.logprob"
LOGITS_CONTEXT = "vllm.v1.worker.gpu.sample.logits_processor.interface"
OUTPUT_V2 = "vllm.v1.worker.gpu.sample.output"
BATCH_V2 = "vllm.v1.worker.gpu.input_batch"
STATES_V2 = "vllm.v1.worker.gpu.states"

# Parameters in which vLLM's kernels find the states of all Mamba layers.
_STATE_LAYOUT = (
    "block_table_ptrs_ptr block_table_stride_req state_base_addrs_ptr state_block_strides_ptr state_elem_sizes_ptr "
    "state_inner_sizes_ptr state_conv_widths_ptr state_group_indices_ptr state_dim_row_count_ptr "
    "state_dim_row_stride_ptr"
)

HOOKS: tuple[Hook, ...] = (
    function(
        ARG_UTILS,
        "EngineArgs.create_speculative_config",
        ROUTING,
        "target_model_config target_parallel_config",
    ),
    *fields(
        ARG_UTILS, "EngineArgs", "speculative_config additional_config spec_model spec_method spec_tokens", ROUTING
    ),
    function(ARG_UTILS, "EngineArgs.add_cli_args", ALIAS, "parser"),
    Hook(SPECULATIVE, "SpeculativeConfig.method", Kind.CHOICE, ROUTING, ("custom_class",)),
    *fields(ARG_UTILS, "EngineArgs", "_api_process_count _api_process_rank", SEVERAL_SERVERS),
    function(SAMPLING_PARAMS, "SamplingParams._validate_spec_decode", MORE_PARAMETERS, "speculative_config"),
    function(ARG_UTILS, "EngineArgs.create_model_config", ITSELF),
    *fields(ARG_UTILS, "EngineArgs", "model revision hf_config_path hf_overrides trust_remote_code", ITSELF),
    function(MODEL_CONFIGURATION, "get_config", ITSELF, "model trust_remote_code revision"),
    Hook(MODELS, "ModelRegistry", Kind.NAME, ITSELF),
    function(MODELS, "_ModelRegistry.register_model", ITSELF, "model_arch model_cls"),
    function(MODELS, "_ModelRegistry.get_supported_archs", ITSELF),
    Hook(MODEL_SETTINGS, "MODELS_CONFIG_MAP", Kind.NAME, ITSELF),
    *fields(MODEL_PARTS, "WeightsMapper", "orig_to_new_prefix", ITSELF),
    *fields(NEMOTRON_H, "NemotronHForCausalLM", "hf_to_vllm_mapper", ITSELF),
    function("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend.get_supported_head_sizes", ITSELF_ON_CPU),
    function(CUSTOM_CLASS, "create_custom_proposer", LOADING, "vllm_config"),
    Hook(RUNNER, "create_custom_proposer", Kind.NAME, LOADING),
    function(RUNNER, "GPUModelRunner.execute_model", STEP, "scheduler_output"),
    *fields(RUNNER, "GPUModelRunner", "vllm_config max_model_len requests input_batch", STEP),
    *fields(SCHEDULER_OUTPUT, "SchedulerOutput", "finished_req_ids", STEP),
    *fields(RUNNER, "GPUModelRunner", "effective_drafter_max_model_len", LAST_TOKENS),
    function(RUNNER, "GPUModelRunner._sample", VERIFYING, "logits spec_decode_metadata"),
    Hook(RUNNER, "RejectionSampler", Kind.NAME, VERIFYING),
    *fields(RUNNER, "GPUModelRunner", "rejection_sampler", VERIFYING),
    *fields(INPUT_BATCH, "InputBatch", "req_ids num_reqs num_tokens_no_spec token_ids_cpu", STEP),
    *fields(INPUT_BATCH, "CachedRequestState", "sampling_params", STEP),
    function(
        REJECTION_SAMPLER,
        "RejectionSampler.forward",
        VERIFYING,
        "metadata draft_probs logits sampling_metadata",
    ),
    function(
        REJECTION_SAMPLER,
        "RejectionSampler.apply_logits_processors",
        VERIFYING,
        "logits sampling_metadata metadata",
    ),
    function(REJECTION_SAMPLER, "RejectionSampler.parse_output", VERIFYING),
    *fields(
        REJECTION_SAMPLER,
        "RejectionSampler",
        "sampler synthetic_mode is_processed_logprobs_mode is_logits_logprobs_mode",
        VERIFYING,
    ),
    function(
        REJECTION_SAMPLER,
        "expand_batch_to_tokens",
        CPU_SAMPLING,
        "x cu_num_tokens num_tokens replace_from replace_to",
    ),
    function(
        REJECTION_SAMPLER,
        "apply_sampling_constraints",
        CPU_SAMPLING,
        "logits cu_num_draft_tokens sampling_metadata",
    ),
    function(RUNNER, "GPUModelRunner.sample_tokens", CPU_SAMPLING, "grammar_output"),
    *fields(RUNNER, "GPUModelRunner", "discard_request_mask", CPU_SAMPLING),
    *fields(INPUT_BATCH, "InputBatch", "generators", CPU_SAMPLING),
    function(SAMPLER, "Sampler.compute_logprobs", VERIFYING, "logits"),
    function(SAMPLER, "Sampler.gather_logprobs", VERIFYING, "logprobs num_logprobs token_ids"),
    function(SAMPLER, "Sampler.gather_specific_token_logprobs", VERIFYING, "logprobs logprob_token_ids sampled"),
    function(SAMPLER, "Sampler.apply_logits_processors", VERIFYING, "logits sampling_metadata predict_bonus_token"),
    *fields(
        DRAFT_METADATA,
        "SpecDecodeMetadata",
        "draft_token_ids num_draft_tokens cu_num_draft_tokens target_logits_indices bonus_logits_indices "
        "cu_num_sampled_tokens",
        VERIFYING,
    ),
    *fields(
        SAMPLING_METADATA,
        "SamplingMetadata",
        "temperature top_k top_p all_greedy max_num_logprobs logprob_token_ids no_penalties bad_words_token_ids "
        "allowed_token_ids_mask logitsprocs output_token_ids thinking_budget_state_holder",
        VERIFYING,
    ),
    Hook(SAMPLING_METADATA, "SamplingMetadata", Kind.KNOWN, KNOWING, names(OF_STEPS)),
    Hook(SAMPLING_PARAMS, "SamplingParams", Kind.KNOWN, KNOWING, names(OF_REQUESTS)),
    *fields(LOGITS_PROCESSORS, "LogitsProcessors", "non_argmax_invariant", VERIFYING),
    *fields(THINKING_BUDGETS, "ThinkingBudgetStateHolder", "in_spec_mode has_tracked_requests", VERIFYING),
    function(
        THINKING_BUDGETS,
        "ThinkingBudgetStateHolder.update_state",
        VERIFYING,
        "output_token_ids spec_token_ids",
    ),
    function(
        THINKING_BUDGETS,
        "ThinkingBudgetStateHolder.apply_to_logits",
        VERIFYING,
        "logits predict_bonus_token spec_token_ids",
    ),
    *fields(OUTPUTS, "SamplerOutput", "sampled_token_ids logprobs_tensors", VERIFYING),
    *fields(OUTPUTS, "LogprobsTensors", "logprob_token_ids logprobs selected_token_ranks", VERIFYING),
    function(RUNNER, "GPUModelRunner._update_states", HYBRID, "scheduler_output"),
    function(RUNNER, "GPUModelRunner._may_reorder_batch", HYBRID, "scheduler_output"),
    *(
        function(RUNNER, f"GPUModelRunner.{name}", HYBRID)
        for name in ("_build_attention_metadata", "_determine_batch_execution_and_padding")
    ),
    *fields(RUNNER, "GPUModelRunner", "num_spec_tokens use_async_scheduling num_accepted_tokens_event", HYBRID),
    *fields(INPUT_BATCH, "InputBatch", "num_accepted_tokens_cpu req_id_to_index num_prompt_tokens", HYBRID),
    *fields(INPUT_BATCH, "CachedRequestState", "num_prompt_tokens num_tokens num_computed_tokens", HYBRID),
    *fields(SCHEDULER_OUTPUT, "SchedulerOutput", "preempted_req_ids scheduled_cached_reqs", HYBRID),
    *fields(SCHEDULER_OUTPUT, "CachedRequestData", "resumed_req_ids", HYBRID),
    Hook(MAMBA_MIXER, "causal_conv1d_update", Kind.NAME, HYBRID_ON_CPU),
    function(MAMBA_MIXER, "MambaMixer2.get_kv_cache_spec", HYBRID_ON_CPU, "vllm_config"),
    function(
        STATE_UPDATE,
        "CPUSSUBackend.__call__",
        HYBRID_ON_CPU,
        "state x dt A B C D dt_bias z dt_softplus state_batch_indices dst_state_batch_indices null_block_id out "
        "num_accepted_tokens cu_seqlens is_blackwell",
    ),
    Hook(NEMOTRON_H, "FusedMoEFactory", Kind.NAME, HYBRID_ON_CPU),
    function(
        MAMBA_UTILS,
        "precopy_mamba_align_fused_kernel",
        HYBRID_ON_CPU,
        "mamba_state_idx_ptr src_col_ptr token_bias_ptr " + _STATE_LAYOUT + " idx_mapping_ptr num_reqs "
        "COPY_BLOCK_SIZE CONV_STATE_DIM_FIRST",
    ),
    function(
        MAMBA_UTILS,
        "postprocess_mamba_fused_kernel",
        HYBRID_ON_CPU,
        "num_accepted_tokens_ptr mamba_state_idx_ptr num_scheduled_tokens_ptr num_computed_tokens_ptr "
        "num_draft_tokens_ptr " + _STATE_LAYOUT + " num_accepted_tokens_out_ptr idx_mapping_ptr num_reqs "
        "block_size COPY_BLOCK_SIZE CONV_STATE_DIM_FIRST",
    ),
    function("vllm.triton_utils.dispatcher", "register_kernels", HYBRID_ON_CPU, "overrides"),
    *fields(RUNNER, "GPUModelRunner", "kv_cache_config compilation_config cache_config mamba_state_idx", OWN_STATE),
    *fields(INPUT_BATCH, "InputBatch", "block_table", OWN_STATE),
    function(BLOCK_TABLE, "BlockTable.get_numpy_array", OWN_STATE),
    *fields(KV_CACHE, "KVCacheGroupSpec", "layer_names kv_cache_spec", OWN_STATE),
    *fields(KV_CACHE, "KVCacheSpec", "block_size", OWN_STATE),
    *fields(ATTENTION, "Attention", "kv_cache num_kv_heads head_size attn_backend impl", OWN_STATE),
    *fields(MAMBA_MIXER, "MambaMixer2", "kv_cache", OWN_STATE),
    function("vllm.model_executor.layers.mamba.mamba_utils", "is_conv_state_dim_first", OWN_STATE),
    function(MODEL_PARTS, "extract_layer_index", OWN_STATE, "layer_name"),
    function("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", HYBRID_ON_CPU),
    function(SPECULATORS, "init_speculator", ON_V2, "vllm_config device req_states"),
    function(SPECULATIVE, "SpeculativeConfig.use_ngram_gpu", ON_V2),
    function(
        SCHEDULER,
        "Scheduler.__init__",
        ON_V2,
        "vllm_config kv_cache_config structured_output_manager block_size",
    ),
    *fields(SCHEDULER, "Scheduler", "dynamic_sd_lookup", ON_V2),
    function(RUNNER_V2, "GPUModelRunner.load_model", ON_V2),
    function(RUNNER_V2, "GPUModelRunner.execute_model", ON_V2, "scheduler_output"),
    *(Hook(RUNNER_V2, name, Kind.NAME, ON_V2) for name in ("init_speculator", "Sampler", "RejectionSampler")),
    *fields(RUNNER_V2, "GPUModelRunner", "speculator rejection_sampler model_memory_usage device dtype", ON_V2),
    function(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "BaseSpeculator.propose",
        ON_V2,
        "input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled num_rejected "
        "last_sampled next_prefill_tokens temperature seeds",
    ),
    function(REJECTION_SAMPLER_V2, "RejectionSampler.__init__", ON_V2, "sampler spec_config device"),
    function(
        REJECTION_SAMPLER_V2, "RejectionSampler.__call__", ON_V2, "logits input_batch draft_logits invalid_drafts"
    ),
    function(
        REJECTION_SAMPLER_V2,
        "gather_draft_sampled",
        ON_V2,
        "input_ids positions logits_indices expanded_idx_mapping expanded_local_pos prefill_len",
    ),
    function(SAMPLER_V2, "Sampler.__init__", ON_V2, "vllm_config max_num_reqs vocab_size device req_states"),
    function(SAMPLER_V2, "Sampler.__call__", ON_V2, "logits input_batch"),
    function(SAMPLER_V2, "Sampler.get_logprobs_dims", ON_V2, "idx_mapping_np"),
    *fields(
        SAMPLER_V2,
        "Sampler",
        "sampling_states logits_processors thinking_budget_state logprob_token_ids_state trace_replay_state "
        "needs_logits_processing return_sampling_mask compute_nans logprobs_mode req_states",
        ON_V2,
    ),
    function(SAMPLING_STATES, "SamplingStates.__init__", ON_V2, "max_num_reqs vocab_size"),
    function(SAMPLING_STATES, "SamplingStates.add_request", ON_V2, "req_idx sampling_params"),
    *fields(SAMPLING_STATES, "SamplingStates", "temperature top_k top_p min_p seeds vocab_size", ON_V2),
    function(
        LOGPROBS_V2,
        "compute_topk_scores",
        ON_V2,
        "logits num_logprobs sampled_token_ids cu_num_logits logprob_token_ids_state expanded_idx_mapping "
        "max_per_req_token_ids logits_mode",
    ),
    *fields(
        LOGITS_CONTEXT,
        "LogitsContext",
        "expanded_idx_mapping idx_mapping idx_mapping_np expanded_local_pos input_ids pos seq_lens_upper_bound_np",
        ON_V2,
    ),
    *fields(OUTPUT_V2, "SamplerOutput", "sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected", ON_V2),
    function(
        BATCH_V2,
        "get_num_sampled_and_rejected",
        ON_V2,
        "num_sampled seq_lens cu_num_logits idx_mapping prefill_len",
    ),
    *fields(
        BATCH_V2,
        "InputBatch",
        "req_ids num_reqs idx_mapping idx_mapping_np expanded_idx_mapping expanded_local_pos input_ids positions "
        "logits_indices cu_num_logits cu_num_logits_np seq_lens seq_lens_cpu_upper_bound",
        ON_V2,
    ),
    *fields(
        STATES_V2,
        "RequestState",
        "max_num_reqs req_id_to_index index_to_req_id all_token_ids total_len prefill_len max_seq_len",
        ON_V2,
    ),
)


def hooks_of(stage: Stage, *, on_cpu: bool = False) -> list[Hook]:
    """The hooks of a stage; on a CPU there are a few more."""
    return [hook for hook in HOOKS if hook.need.stage == stage and (on_cpu or not hook.need.cpu_only)]
