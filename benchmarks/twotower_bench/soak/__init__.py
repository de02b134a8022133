"""`vllm serve` under mixed traffic for as long as one likes, beside one without speculation that is asked the same."""

from twotower_bench.soak.checks import Check
from twotower_bench.soak.running import Soak
from twotower_bench.soak.servers import PLANS, Limits, SoakPlan, plans_of

__all__ = ["PLANS", "Check", "Limits", "Soak", "SoakPlan", "plans_of"]
