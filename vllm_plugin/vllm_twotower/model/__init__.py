"""The context tower of a TwoTower checkpoint as a model of vLLM: `vllm serve T`."""
