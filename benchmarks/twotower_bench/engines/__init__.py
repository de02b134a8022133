"""vLLM engines in processes of their own, and what is measured in them."""

from twotower_bench.engines.messages import Asked, Piece, Ready, Served, ServeOrder
from twotower_bench.engines.pool import EnginePool, EngineSpec
from twotower_bench.engines.process import EngineProcess

__all__ = [
    "Asked",
    "EnginePool",
    "EngineProcess",
    "EngineSpec",
    "Piece",
    "Ready",
    "ServeOrder",
    "Served",
]
