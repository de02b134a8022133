"""Ahead-of-time compilation of every kernel for three generations of GPUs, on any machine.

`python -m twotower_kernels.compilation [OP ...]` prints what each kernel needs, with `--markdown` as the table of
kernels/README.md; spilled registers are an error. It compiles with the Triton that Python finds first: another one,
unpacked in a folder, is tried with that folder as PYTHONPATH.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)
# Shared memory of a multiprocessor in KiB; the other limits are the same for all three.
SHARED_KIB = {80: 164, 90: 228, 100: 228}
# Ops that have kernels.
OPS = tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/kernel.py")))


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch on model-true shapes makes it.

    Attributes:
        name: of the kernel, and what tells its variants apart.
        function: the `@triton.jit` function.
        signature: Triton type of every argument that is no constant ("*bf16", "i32", "fp32", ...), by name.
        constants: value of every `tl.constexpr` argument, and of arguments that are None or 1, by name.
        num_warps, num_stages: of the launch.
        aligned: names of pointers and integers that are multiples of 16; None for all of the signature's pointers.
        options: further options of the launch (`enable_fp_fusion`).
        least_capability: of the GPUs that it is launched on.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    least_capability: int = CAPABILITIES[0]


@dataclass(frozen=True)
class Resources:
    """Resources that a compiled kernel takes.

    Attributes:
        registers: per thread.
        shared_bytes: per program.
        spill_bytes: local memory per thread; more than 0 where registers did not suffice.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int

    def occupancy(self, num_warps: int, capability: int) -> float:
        """Share of a multiprocessor's 64 warps that can be resident at once.

        Source: the occupancy tables of NVIDIA's tuning guides.
        """
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        shared_bytes = self.shared_bytes + 1024  # the system reserves 1 KiB per program
        programs = min(
            32,
            64 // num_warps,
            65536 // (registers_of_warp * num_warps),
            (SHARED_KIB[capability] << 10) // shared_bytes,
        )
        return programs * num_warps / 64


def all_variants(ops: Iterable[str] = OPS) -> Iterator[tuple[str, Variant]]:
    """Every variant of these ops, with the op's name."""
    for op in ops:
        for variant in import_module(f"twotower_kernels.{op}.variants").variants():
            yield op, variant


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compiles for a compute capability (90 for sm_90) and reads the binary's resource usage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.function.arg_names)
    missing = [name for name in names if name not in variant.signature and name not in variant.constants]
    unknown = [name for name in (*variant.signature, *variant.constants) if name not in names]
    if missing or unknown:
        raise ValueError(
            f"variant {variant.name}: arguments {missing} are missing and {unknown} unknown; name each once"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    pointers = tuple(name for name, kind in variant.signature.items() if kind.startswith("*"))
    aligned = pointers if variant.aligned is None else variant.aligned
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(variant.function, signature, dict(variant.constants), attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        shared_bytes=max(compiled.metadata.shared, usage["SHARED"]),
        spill_bytes=max(usage["LOCAL"], usage["STACK"]),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Resource usage of the only function of a binary, from the cuobjdump that comes with Triton."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def main(arguments: list[str]) -> int:
    """Prints a table of the named ops, or of all; returns the number of compilations that spilled."""
    import triton

    markdown, ops = "--markdown" in arguments, [op for op in arguments if op != "--markdown"]
    kernel = f"kernel, Triton {triton.__version__}"
    print(_markdown_head() if markdown else f"{kernel:56} {'sm':>4} {'warps':>5} {'registers':>9} {'shared':>8} spills")
    faults = 0
    for op, variant in all_variants(ops or OPS):
        made: dict[int, Resources] = {}
        for capability in (one for one in CAPABILITIES if one >= variant.least_capability):
            made[capability] = needs = compile_variant(variant, capability)
            faults += needs.spill_bytes > 0
            if not markdown:
                print(
                    f"{op + '/' + variant.name:56} {capability:4} {variant.num_warps:5} {needs.registers:9} "
                    f"{needs.shared_bytes:8} {needs.spill_bytes:6}",
                    flush=True,
                )
        if markdown:
            print(_markdown_row(f"{op}: {variant.name}", variant.num_warps, made), flush=True)
    return faults


def _markdown_head() -> str:
    columns = ["kernel", "warps", *(f"sm_{capability}" for capability in CAPABILITIES), "spills"]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def _markdown_row(name: str, num_warps: int, made: Mapping[int, Resources]) -> str:
    """Registers per thread, KiB of shared memory per program and occupancy, for each capability."""
    cells = [
        f"{needs.registers}, {round(needs.shared_bytes / 1024, 1):g}, {needs.occupancy(num_warps, capability):.0%}"
        if (needs := made.get(capability))
        else "-"
        for capability in CAPABILITIES
    ]
    spills = sum(needs.spill_bytes for needs in made.values())
    return f"| {name} | {num_warps} | {' | '.join(cells)} | {spills or 'none'} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
