"""Draft with the bundled TwoTower model, verify with the bundled verifier: python examples/speculative.py [PROMPT]

Accepted drafts are green, what the verifier chose itself is bold.
"""

import sys

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from twotower_spec import TwoTowerModel
from twotower_spec.demo import held_out_prompts, trio_path
from twotower_spec.drafting import DraftingSession, FixedPolicy, SpeculativeRun

prompt = sys.argv[1] if len(sys.argv) > 1 else held_out_prompts("maths")[30].prompt
tokenizer = AutoTokenizer.from_pretrained(trio_path("verifier"))
verifier = AutoModelForCausalLM.from_pretrained(trio_path("verifier"), dtype=torch.float32).eval()
towers = TwoTowerModel.from_pretrained(trio_path("twotower"), dtype="float32", progress=False)
drafter = DraftingSession(towers, FixedPolicy(block_size=8, num_steps=1))

console = Console(highlight=False)
console.print(Text(prompt, style="dim"), end="")
run = SpeculativeRun(verifier, drafter, [tokenizer(prompt)["input_ids"]], 160, eos_token_id=tokenizer.eos_token_id)
for step in run:
    for i, token in enumerate(step.token_ids):
        if token != tokenizer.eos_token_id:
            console.print(Text(tokenizer.decode([token]), style="green" if i < step.num_accepted else "bold"), end="")

summary = run.metrics.summary()
console.print(
    f"\n{summary.acceptance_length:.2f} tokens per verifier pass, {summary.tokens_per_denoiser_pass or 0:.2f} per "
    f"denoiser pass; accepted drafts per round: {summary.histogram}"
)
