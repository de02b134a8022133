"""Parts of `benchmarks/gpu.sh`, each a module that is run: `python3 -m twotower_bench.gpu.goldens DEVICE FILE`.

They need what the core needs, and nothing that is installed: no entry points, no git, no network. Each writes a row of
JSON as soon as it knows it, so that a run that is cut short loses only what it had not measured.
"""
