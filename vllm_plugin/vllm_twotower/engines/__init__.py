"""vLLM engines in processes of their own, and what is measured in them."""

from vllm_twotower.engines.environment import engine_environment
from vllm_twotower.engines.messages import Asked, Piece, Ready, Served, ServeOrder
from vllm_twotower.engines.pool import EnginePool, EngineSpec
from vllm_twotower.engines.process import EngineProcess

__all__ = [
    "Asked",
    "EnginePool",
    "EngineProcess",
    "EngineSpec",
    "Piece",
    "Ready",
    "ServeOrder",
    "Served",
    "engine_environment",
]
