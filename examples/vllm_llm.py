"""Generate with vLLM's LLM(), drafted by a TwoTower model, and compare with the text without drafts.

    python examples/vllm_llm.py
    python examples/vllm_llm.py --verifier DIR --drafter DIR "A prompt" "Another one"

By default the bundled trio writes answers to prompts it was never trained on. vLLM wants one LLM() per process, so the
run without drafts is this script once more, with `--without`. About a minute on a CPU, most of which vLLM starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from twotower_spec.demo import held_out_prompts, trio_path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = [held_out_prompts(category)[i].prompt for category in ("maths", "python") for i in (0, 1)]
    parser.add_argument("prompts", nargs="*", default=examples, help="default: four held-out prompts")
    parser.add_argument("--verifier", default=str(trio_path("verifier")), help="the model whose text it is")
    parser.add_argument("--drafter", default=str(trio_path("twotower")), help="a TwoTower checkpoint")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--without", action="store_true", help="without drafts, and without a second process")
    parser.add_argument("--save", type=Path, help="write the texts as JSON to this file")
    return parser.parse_args()


def make_llm(verifier: str, drafter: str | None) -> Any:
    """A vLLM engine; what is not about drafting keeps it small on a CPU."""
    from vllm import LLM
    from vllm.platforms import current_platform

    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "disable_log_stats": False}
    if current_platform.is_cpu():
        # Without rounding to bfloat16 the text is the same to the token, however many tokens are verified at once.
        settings |= {"dtype": "float32", "enforce_eager": True}
    if drafter is not None:
        settings["speculative_config"] = {"model": drafter, "num_speculative_tokens": 15}
    return LLM(model=verifier, **settings)


def generate(llm: Any, prompts: list[str], max_tokens: int) -> list[str]:
    from vllm import SamplingParams

    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens), use_tqdm=False)
    return [result.outputs[0].text for result in results]


def print_acceptance(llm: Any) -> None:
    """Prints what vLLM counted, the TwoTower drafter's own numbers among it."""
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    drafts = counted["vllm:spec_decode_num_drafts"]
    accepted = counted["vllm:spec_decode_num_accepted_tokens"]
    print(f"acceptance length: {1 + accepted / max(drafts, 1):.2f} tokens per verification, of {drafts} drafts")
    print(f"denoiser passes: {counted['vllm:twotower_denoiser_passes']:.0f}")


def texts_without_drafts(options: argparse.Namespace) -> list[str]:
    """The same prompts through the verifier alone, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "texts.json")
        command = [sys.executable, __file__, "--without", "--save", str(saved), "--verifier", options.verifier]
        command += ["--max-tokens", str(options.max_tokens), "--", *options.prompts]
        # With the engine in that process too, vLLM is imported once.
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        texts: list[str] = json.loads(saved.read_text())
        return texts


def main() -> None:
    # Before vLLM starts its processes: with one thread small models are about ten times as fast on a CPU.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    options = parse_arguments()
    llm = make_llm(options.verifier, None if options.without else options.drafter)
    texts = generate(llm, options.prompts, options.max_tokens)
    if options.save:
        options.save.write_text(json.dumps(texts))
    for prompt, text in zip(options.prompts, texts, strict=True):
        print(f"--- {prompt}\n+++{text}\n")
    if not options.without:
        print_acceptance(llm)
        expected = texts_without_drafts(options)
        same = sum(text == other for text, other in zip(texts, expected, strict=True))
        print(f"the same text as without drafts: {same} of {len(texts)}")


if __name__ == "__main__":
    main()
