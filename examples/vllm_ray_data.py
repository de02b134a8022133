"""Generate in bulk over Ray Data's vLLM processor, drafted by a TwoTower model: prompts.jsonl in, results.jsonl out.

    pip install 'twotower-spec[ray]'
    python examples/vllm_ray_data.py --output results.jsonl
    python examples/vllm_ray_data.py --verifier DIR --drafter DIR --input prompts.jsonl --output results.jsonl

Every line of the input is an object with a "prompt"; whatever else it has is kept, "text" and "num_tokens" are added.
Results come in the order in which they are done. Ray forwards the engine's log, in which vLLM states the acceptance
length (`SpecDecoding metrics`) after every batch. About a minute on a CPU. On a cluster, name it with `--address auto`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from twotower_spec.demo import held_out_prompts, trio_path

MAX_MODEL_LEN = 512


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", default=str(trio_path("verifier")), help="the model whose text it is")
    parser.add_argument("--drafter", default=str(trio_path("twotower")), help="a TwoTower checkpoint")
    parser.add_argument("--input", help="JSONL, one object with a prompt per line; default: 16 held-out prompts")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8, help="rows that go to an engine together")
    parser.add_argument("--engines", type=int, default=1, help="engines that run side by side")
    parser.add_argument("--address", default="local", help="Ray cluster; local starts one on this machine")
    return parser.parse_args()


def start_ray(address: str) -> None:
    if address == "local":
        # The vLLM actor takes one core and the tasks that read and write the other; the rows are small.
        ray.init(address="local", num_cpus=2, object_store_memory=256 << 20, include_dashboard=False)
    else:
        ray.init(address=address)


def processor_config(options: argparse.Namespace) -> vLLMEngineProcessorConfig:
    """vLLM's settings with the drafter among them, and what an engine takes of the machine."""
    engine: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": options.batch_size}
    engine["speculative_config"] = {"model": options.drafter, "num_speculative_tokens": 15}
    placement: dict[str, Any] = {}
    if not torch.cuda.is_available():
        engine |= {"dtype": "float32", "enforce_eager": True}
        # Without this Ray asks for a GPU per engine, and waits for one for ever.
        placement = {"placement_group_config": {"bundles": [{"CPU": 1}]}}
    return vLLMEngineProcessorConfig(
        model_source=options.verifier,
        engine_kwargs=engine,
        batch_size=options.batch_size,
        concurrency=options.engines,
        # Each of these stages would be an actor with a core of its own; vLLM does their work itself.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        # vLLM's metrics at Ray's endpoint need ray[serve]; its log has those that matter here.
        log_engine_metrics=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}},
        **placement,
    )


def read_prompts(path: str | None) -> ray.data.Dataset:
    if path:
        return ray.data.read_json(path, lines=True)
    return ray.data.from_items([{"prompt": row.prompt, "source": row.source} for row in held_out_prompts("maths")[:16]])


def generate(options: argparse.Namespace) -> ray.data.Dataset:
    """The dataset of results, which is computed while it is read."""
    sampling = {"temperature": 0.0, "max_tokens": options.max_tokens}
    processor = build_processor(
        processor_config(options),
        # The line travels with its request: the engine replaces some of its columns, and adds twenty.
        preprocess=lambda row: {"line": dict(row), "prompt": row["prompt"], "sampling_params": sampling},
        postprocess=lambda row: {
            **row["line"],
            "text": row["generated_text"],
            "num_tokens": row["num_generated_tokens"],
        },
    )
    return processor(read_prompts(options.input))


def main() -> None:
    options = parse_arguments()
    start_ray(options.address)
    with options.output.open("w", encoding="utf-8") as out:
        count = 0
        for row in generate(options).iter_rows():
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count} results in {options.output}")
    ray.shutdown()


if __name__ == "__main__":
    main()
