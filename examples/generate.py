"""Generate with all three modes and compare them: python examples/generate.py CHECKPOINT 12,44,7"""

import sys

from twotower_spec import TwoTowerModel

checkpoint, ids = sys.argv[1], [int(i) for i in sys.argv[2].split(",")]
model = TwoTowerModel.from_pretrained(checkpoint, dtype="float32")

for name in ("generate_ar", "generate_mock_ar", "generate_mask_diffusion"):
    result = getattr(model, name)([ids], max_new_tokens=32)
    passes = result.tokens_per_denoiser_pass
    print(f"{name}: {result.token_ids[0]}")
    print(f"  {result.tokens_per_s:.0f} tokens/s" + (f", {passes:.2f} tokens per denoiser pass" if passes else ""))
