"""Backend `cpu` of Triton for its interpreter: with it vLLM's model runner V2 runs on a CPU, unchanged.

Only for processes with this folder on their path: vLLM's runner V1 computes otherwise where it finds Triton.
"""
