"""`vllm serve` under load: servers, vLLM's own load generator, and the order in which both are used."""

from vllm_twotower.serving_bench.load_generator import LoadGenerator, Workload
from vllm_twotower.serving_bench.measuring import ServePlan, ServersMode, Slot, measure_endpoint, measure_servers
from vllm_twotower.serving_bench.server import Endpoint, VllmServer, running_servers

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
