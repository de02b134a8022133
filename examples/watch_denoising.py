"""Watch blocks being denoised: python examples/watch_denoising.py CHECKPOINT 12,44,7"""

import sys

from twotower_spec import DiffusionConfig, TwoTowerModel

checkpoint, ids = sys.argv[1], [int(i) for i in sys.argv[2].split(",")]
model = TwoTowerModel.from_pretrained(checkpoint, dtype="float32")
config = DiffusionConfig(block_size=8, steps_per_block=8, confidence_threshold=0.8)

for block in model.stream_mask_diffusion([ids], max_new_tokens=24, config=config, with_traces=True):
    print(f"block {block.block_index}, {block.num_denoiser_passes} denoiser passes")
    assert block.trace is not None
    for xt in block.trace.xt:
        print("  " + " ".join("___" if token == config.mask_token_id else f"{token:3d}" for token in xt))
