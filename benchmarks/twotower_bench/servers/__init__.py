"""`vllm serve` under load: servers, vLLM's own load generator, and the order in which both are used."""

from twotower_bench.servers.load_generator import LoadGenerator, Workload
from twotower_bench.servers.measuring import ServePlan, ServersMode, measure_endpoint, measure_servers
from twotower_bench.servers.server import Endpoint, VllmServer, running_servers

__all__ = [
    "Endpoint",
    "LoadGenerator",
    "ServePlan",
    "ServersMode",
    "VllmServer",
    "Workload",
    "measure_endpoint",
    "measure_servers",
    "running_servers",
]
