"""Commands that need vLLM, for `twotower-spec`: they join it through the entry points `twotower_spec.commands`.

The command line imports these files wherever it runs, so nothing here imports vLLM.
"""
