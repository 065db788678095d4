"""Compiles kernels for a named GPU without one: PTX, machine code, and what the machine code needs.

``python -m tide_kernels.cuda.offline 9.0 [NAME ...]`` prints one line of JSON for each kernel of the catalogue whose
name starts with one of the names. One process compiles for one architecture: Numba keeps device functions without it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher

from tide_kernels.cuda.kernel import Kernel

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""What CUDA 13 compiles for, by generation; 7.0 takes CUDA 12."""


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
    seconds: float


def resources(name: str, kernel: Kernel, capability: tuple[int, int]) -> Resources:
    """Compile one kernel for a compute capability."""
    start = time.perf_counter()
    with _as_if_on(capability):
        ptx, _ = cuda.compile_ptx(kernel.function, kernel.signature, cc=capability, launch_bounds=kernel.max_threads)
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
        seconds=round(time.perf_counter() - start, 2),
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


def main(architecture: str, *names: str) -> None:
    from tide_kernels.cuda.catalogue import catalogue

    major, _, minor = architecture.partition(".")
    capability = int(major), int(minor)
    for name, make in catalogue().items():
        if not names or name.startswith(names):
            kernel = make()
            if kernel.oldest <= capability:
                print(json.dumps(asdict(resources(name, kernel, capability))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
