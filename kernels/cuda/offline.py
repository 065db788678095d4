"""Compiles kernels for named GPUs without one: PTX, machine code, and what the machine code needs.

``python -m tide_kernels.cuda.offline 8.0,9.0 [NAME ...]`` prints one line of JSON for each architecture and each kernel
of the catalogue whose name starts with one of the names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba.cuda import compiler, dispatcher

from tide_kernels.cuda.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel needs on one architecture. Bytes of spills are what does not fit registers."""

    name: str
    architecture: str
    threads: int
    registers: int
    shared_bytes: int
    local_bytes: int
    spill_bytes: int
    code_bytes: int
    float64_instructions: int
    vector_loads: int


def resources(name: str, kernel: Kernel, capabilities: Sequence[tuple[int, int]]) -> Iterator[Resources]:
    """Compile one kernel for compute capabilities, those that it is for.

    Numba's part, four fifths of the time, is done once, for the oldest of them. That holds while nothing here is
    lowered by capability (as ``tanh`` is under fastmath, which no kernel uses): of 19 kernels, PTX from another
    capability's lowering differed from that of its own in the names of functions alone.
    """
    fitting = [capability for capability in capabilities if kernel.oldest <= capability]
    if not fitting:
        return
    oldest = min(fitting)
    with _as_if_on(oldest):
        # What compile_ptx begins with, which keeps this to itself; numba-cuda is pinned below the next minor version.
        library, _ = compiler._compile_pyfunc_with_fixup(
            kernel.function,
            kernel.signature,
            cc=oldest,
            device=False,
            abi="numba",
            launch_bounds=kernel.max_threads,
        )
    for capability in fitting:
        try:
            (ptx,) = library.get_asm_strs(cc=capability)
            found = _resources(name, kernel, capability, ptx)
        except Exception as error:  # of any kind: a capability that NVVM or the assembler does not know
            raise SystemExit("{}.{} cannot be compiled for ({})".format(*capability, error)) from error
        yield found


def _resources(name: str, kernel: Kernel, capability: tuple[int, int], ptx: str) -> Resources:
    code_bytes, log = _assemble(ptx, capability)
    usage = log[log.rindex("Used ") :]  # the kernel's own line follows those of its device functions

    def number(pattern: str, text: str) -> int:
        return sum(int(match) for match in re.findall(pattern, text))

    return Resources(
        name=name,
        architecture="{}.{}".format(*capability),
        threads=kernel.max_threads,
        registers=number(r"Used (\d+) registers", usage),
        shared_bytes=number(r"(\d+) bytes smem", usage),
        local_bytes=number(r"(\d+) bytes lmem", usage),
        spill_bytes=number(r"(\d+) bytes spill", log),
        code_bytes=code_bytes,
        float64_instructions=ptx.count(".f64"),
        vector_loads=len(re.findall(r"ld\.global\S*\.v4", ptx)),
    )


def _assemble(ptx: str, capability: tuple[int, int]) -> tuple[int, str]:
    """Bytes of machine code for a PTX text, and the assembler's report."""
    linker = nvjitlink.create(2, ["-arch=sm_{}{}".format(*capability), "-verbose"])
    try:
        code = ptx.encode()
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, code, len(code), "kernel.ptx")
        nvjitlink.complete(linker)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
        return nvjitlink.get_linked_cubin_size(linker), log.decode(errors="replace")
    finally:
        nvjitlink.destroy(linker)


@contextmanager
def _as_if_on(capability: tuple[int, int]) -> Iterator[None]:
    """Numba asks the current device for its capability where a kernel calls a device function: answer in its place."""
    real = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = real


def main(architectures: str, *names: str) -> None:
    from tide_kernels.cuda.catalogue import catalogue

    parts = [architecture.partition(".") for architecture in architectures.split(",")]
    capabilities = [(int(major), int(minor)) for major, _, minor in parts]
    for name, make in catalogue().items():
        if not names or name.startswith(names):
            for found in resources(name, make(), capabilities):
                print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
