"""How many tokens and sequences fit: K/V pages from free memory, residents up to the knee of throughput."""

from __future__ import annotations

import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from tide_ray.config import EngineConfig
from tide_ray.engine.kv_cache import page_bytes
from tide_ray.models.adapter import Adapter
from tide_ray.types import UserError

# Residents beyond which a step costs as much per row as before it. A CPU computes as slowly per row at 128 rows as at
# any more (jobs/benchmark.py throughput); a GPU streams its weights for a few hundred rows before arithmetic binds.
KNEE = {"cpu": 128, "cuda": 256}

# A model that allows very long prompts must not take all memory for one page table's worth of tokens by default.
DEFAULT_MODEL_LEN = 8192

# mallopt's parameters (malloc.h) and what they are set to; glibc takes no larger mmap threshold.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_HEAP_BUFFER, KEPT_BYTES, HEAP_STEP = 32 << 20, 512 << 20, 64 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``num_pages`` K/V pages, at most ``max_num_seqs`` residents of at most ``max_model_len`` tokens each."""

    num_pages: int
    max_num_seqs: int
    max_model_len: int


def keep_freed_memory() -> None:
    """Let the C library keep what the engine frees, for the whole process; nothing happens without glibc.

    By default glibc gives large buffers back to the system as soon as they are freed, so that every step of a CPU
    engine takes page faults for its activations anew: 90,000 in 15,000 tokens, a tenth of the time.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BUFFER)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    libc.mallopt(M_TOP_PAD, HEAP_STEP)


def return_freed_memory() -> None:
    """Give what was freed back to the system, once: after loading weights, or between phases that share little."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: free device memory, or available RAM within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    room = container_room(Path("/sys/fs/cgroup"))
    return available if room is None else min(available, room)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most bytes that this process has held: of RAM, and of a GPU's memory as far as torch gave it out."""
    peaks = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks


def container_room(root: Path) -> int | None:
    """Bytes left under the container's memory limit (control groups v2 or v1 at ``root``), None without a limit.

    File cache that the kernel can drop counts as room: having read the weights' files must not look like using memory.
    """
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        if not (root / limit).exists():
            continue
        limit_text = (root / limit).read_text(encoding="ascii").strip()
        if not limit_text.isdigit():
            return None
        stat = ((root / used).parent / "memory.stat").read_text(encoding="ascii").split()
        cache = int(stat[stat.index(droppable) + 1]) if droppable in stat else 0
        return max(int(limit_text) - int((root / used).read_text(encoding="ascii")) + cache, 0)
    return None


def plan_memory(config: EngineConfig, adapter: Adapter, *, model_limit: int) -> MemoryPlan:
    """Pages for as many residents as the knee allows, each with ``max_model_len`` tokens, within free memory.

    Raises:
        UserError: a limit above the model's, or memory for less than one sequence.
    """
    wanted_len = config.max_model_len or min(model_limit, DEFAULT_MODEL_LEN)
    if wanted_len > model_limit:
        raise UserError(f"max_model_len must be at most the model's limit of {model_limit} tokens, got {wanted_len}")
    max_num_seqs = config.max_num_seqs or KNEE[adapter.device.type]
    per_page = page_bytes(adapter.kv_shapes, config.page_size, adapter.dtype)
    affordable = int(free_memory(adapter.device) * config.kv_memory_fraction) // per_page
    pages_per_sequence = -(-wanted_len // config.page_size)
    num_pages = min(affordable, max_num_seqs * pages_per_sequence)
    if num_pages < pages_per_sequence:
        if config.max_model_len is not None or num_pages < 1:
            raise UserError(
                f"max_model_len: {wanted_len} tokens need {pages_per_sequence * per_page / 2**20:.0f} MiB of K/V, "
                f"got {affordable * per_page / 2**20:.0f} MiB free (kv_memory_fraction {config.kv_memory_fraction})"
            )
        wanted_len = num_pages * config.page_size
    return MemoryPlan(num_pages, max_num_seqs, wanted_len)
