"""A matrix of faults in a serving engine: every stage of a round, every kind of fault, before, during and after a load.

`python -m benchmarks.faults` runs it and writes docs/faults.md. What a cell must hold is in `judging`.
"""
