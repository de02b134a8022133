"""Drafting in vLLM's model runner V1: proposer, sampler, and what they need of the runner."""
