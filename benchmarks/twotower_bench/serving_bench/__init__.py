"""`vllm serve` under load: servers, vLLM's own load generator, and the order in which both are used."""

from twotower_bench.serving_bench.load_generator import LoadGenerator, Workload
from twotower_bench.serving_bench.measuring import ServePlan, ServersMode, Slot, measure_endpoint, measure_servers
from twotower_bench.serving_bench.server import Endpoint, VllmServer, running_servers

__all__ = [
    "Endpoint",
    "LoadGenerator",
    "ServePlan",
    "ServersMode",
    "Slot",
    "VllmServer",
    "Workload",
    "measure_endpoint",
    "measure_servers",
    "running_servers",
]
