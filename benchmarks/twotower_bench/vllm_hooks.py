"""Every place of vLLM that the benchmarks touch beyond those of the plugin, as data; see `vllm_twotower.hook_table`."""

from vllm_twotower.hook_table import Hook, Need, fields, function

MEASURING = Need("benchmarks of acceptance and speed", "measuring", required=False)
SERVING = Need("benchmarks of servers", "measuring", required=False)

SCHEDULER = "vllm.v1.core.sched.scheduler"
SCHEDULER_OUTPUT = "vllm.v1.core.sched.output"
OUTPUTS = "vllm.v1.outputs"
ENGINE_CORE = "vllm.v1.engine.core"
ENGINE_CLIENT = "vllm.v1.engine.core_client"
LOAD_GENERATOR = "vllm.benchmarks.serve"

RECORDING_HOOKS: tuple[Hook, ...] = (
    function(SCHEDULER, "Scheduler.update_from_output", MEASURING, "scheduler_output model_runner_output"),
    *fields(SCHEDULER, "Scheduler", "requests", MEASURING),
    *fields(
        SCHEDULER_OUTPUT,
        "SchedulerOutput",
        "num_scheduled_tokens scheduled_spec_decode_tokens num_invalid_spec_tokens",
        MEASURING,
    ),
    *fields(OUTPUTS, "ModelRunnerOutput", "req_id_to_index sampled_token_ids", MEASURING),
    *fields(ENGINE_CLIENT, "InprocClient", "engine_core", MEASURING),
    *fields(ENGINE_CORE, "EngineCore", "scheduler", MEASURING),
)
LOAD_GENERATOR_HOOKS: tuple[Hook, ...] = (
    function(LOAD_GENERATOR, "add_cli_args", SERVING, "parser"),
    function(LOAD_GENERATOR, "main", SERVING, "args"),
)
HOOKS = RECORDING_HOOKS + LOAD_GENERATOR_HOOKS
