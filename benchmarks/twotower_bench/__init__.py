"""Measuring with real vLLM: engines, servers, acceptance, sweeps, and the report; a server loads nothing of it."""
