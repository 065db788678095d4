"""Launches that only decode, from CUDA graphs: one for each stage and number of rows in steps.

Starting some hundred kernels from Python takes longer than few rows take on a GPU; a graph starts all of them in one
call. It reads and writes memory that was there when it was captured, so a launch's rows are copied to tensors that all
graphs share, and rows that are missing up to the graph's size run as padding: each is a sequence of one token whose K/V
go to a page that is set aside. States are handed from stage to stage, and out, in another shared tensor.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.paged_attention import unfit_heads
from tide_ray.engine.flow import Flow
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.rows import LaunchCache, RowBatch
from tide_ray.engine.stages import Stage
from tide_ray.models.adapter import Adapter
from tide_ray.models.layer_calls import LayerCall, selected_calls

logger = logging.getLogger(__name__)

MAX_GRAPH_ROWS = 512
"""Rows above which starting kernels takes less time than they run."""


Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a replay of some work: calling that does the same work on the same tensors again."""


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory; they must be replayed on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()  # kernels are compiled and loaded, and workspaces allocated: nothing of that can be captured
        graph = torch.cuda.CUDAGraph()
        # What other threads do to the device, such as another engine's, must not spoil the capture; and one that fails
        # leaves its own stream behind as the current one, so the outer context puts that right.
        capturing = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), capturing:
            work()
        current.wait_stream(self._stream)
        return graph.replay


def capture_for(adapter: Adapter) -> Capture | None:
    """How graphs are captured for a model where it lies; None where there are none.

    Without the attention kernel every row would gather a whole page table's K/V.
    """
    if adapter.device.type != "cuda":
        return None
    head_dims = {shape.head_dim for shape in adapter.kv_shapes}
    if not all(gpu.runs(adapter.device, adapter.dtype, unfit_heads(head_dim)) for head_dim in head_dims):
        return None
    return CudaCapture(adapter.device)


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for: the largest is ``max_rows``, up to MAX_GRAPH_ROWS.

    1, 2, 4, then steps of 8, and from 64 on of a quarter of the power of two below, so that padding stays below a
    fifth and graphs are few.
    """
    most = min(max_rows, MAX_GRAPH_ROWS)
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size += size if size < 8 else max(8, 1 << (size.bit_length() - 3))
    return [*sizes, most]


@dataclass(frozen=True, slots=True)
class _Graph:
    """``calls``: how the model calls its layers for the graph's rows, as it was when the work last ran."""

    replay: Callable[[], None]
    cache: LaunchCache
    calls: list[LayerCall]


class StageGraphs:
    """The graphs of a model's stages, captured when they are first needed.

    A stage of which a capture fails runs without graphs from then on.

    Args:
        spare_page: a page that belongs to no sequence.
        max_rows: most rows that decode in a launch.
        max_model_len: most tokens of a sequence. Rows of a launch may have tables of fewer pages than that takes: what
            an earlier launch left beyond them is not read.
    """

    def __init__(
        self,
        adapter: Adapter,
        stages: Sequence[Stage],
        pools: KVCache,
        capture: Capture,
        *,
        spare_page: int,
        max_rows: int,
        max_model_len: int,
    ) -> None:
        self.sizes = graph_sizes(max_rows)
        self.max_pages = -(-max_model_len // pools.page_size)
        self._adapter = adapter
        self._stages = stages
        self._pools = pools
        self._capture = capture
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._failed: set[int] = set()
        most, device = self.sizes[-1], adapter.device
        zeros = partial(torch.zeros, most, dtype=torch.long, device=device)
        pages = torch.full((most, self.max_pages), spare_page, dtype=torch.int32, device=device)
        lengths = torch.ones(most, dtype=torch.int32, device=device)
        self._rows = RowBatch(
            zeros(), zeros(), zeros() + spare_page, zeros(), pages, lengths, num_decode=most, chunks=[]
        )
        self._padding = [tensor.clone() for tensor in self._rows.tensors]
        self._states = torch.zeros(most, adapter.config.hidden_size, dtype=adapter.dtype, device=device)
        self._filled: RowBatch | None = None
        self._num_filled = 0

    @property
    def num_captured(self) -> dict[str, int]:
        """Graphs of each stage."""
        return {
            stage.name: sum(of == index for of, _ in self._graphs)
            for index, stage in enumerate(self._stages)
            if index not in self._failed
        }

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture what is missing now. The largest come first, so that the others fit in the memory that they leave."""
        for size in reversed(self.sizes):
            for index in range(len(self._stages)):
                self._graph(index, size)

    def run(self, index: int, flow: Flow) -> bool:
        """Take rows through stage ``index``; False, and nothing has happened, where they must run without a graph."""
        rows = flow.rows
        if rows.num_decode < rows.num_rows:
            return False
        graph = self._graph(index, rows.num_rows)
        if graph is None:
            return False
        if index and flow.hidden.data_ptr() != self._states.data_ptr():
            self._states[: rows.num_rows] = flow.hidden
        self._fill(rows)
        graph.replay()
        flow.hidden = self._states[: rows.num_rows]
        if self._adapter.calls_are_by_row:
            flow.start = partial(self._start, graph, flow)
        return True

    def _graph(self, index: int, num_rows: int) -> _Graph | None:
        if index in self._failed or num_rows > self.sizes[-1]:
            return None
        size = self.sizes[bisect.bisect_left(self.sizes, num_rows)]
        if (index, size) not in self._graphs:
            self._pad(0, self._num_filled)  # what runs before a capture must write to no sequence's pages
            states = self._states.clone()  # they may be those of the launch that waits for this graph
            try:
                self._graphs[index, size] = self._captured(index, size)
            except Exception as error:  # whatever a model does that no graph can hold, of which there is no list
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                logger.warning("%s runs without CUDA graphs: %s", self._stages[index].name, reason)
                self._failed.add(index)
                return None
            finally:
                self._states.copy_(states)
        return self._graphs[index, size]

    def _captured(self, index: int, size: int) -> _Graph:
        rows = RowBatch(*(tensor[:size] for tensor in self._rows.tensors), num_decode=size, chunks=[])
        cache, states = LaunchCache(self._pools, rows), self._states[None, :size]
        calls: list[LayerCall] = []

        def work() -> None:
            embedded, calls[:] = self._adapter.prologue(rows.token_ids, rows.positions, cache)
            states.copy_(self._stages[index].run(self._adapter, states if index else embedded, calls, cache))

        return _Graph(self._capture(work), cache, calls)

    def _fill(self, rows: RowBatch) -> None:
        """Copy a launch's rows to the graphs', and make padding of those that the launch before had more."""
        if rows is self._filled:  # by the stage before
            return
        num_rows, width = rows.pages.shape
        mine = [tensor[:num_rows] if tensor.ndim == 1 else tensor[:num_rows, :width] for tensor in self._rows.tensors]
        _copy(mine, rows.tensors)
        self._pad(num_rows, self._num_filled)
        self._filled, self._num_filled = rows, num_rows

    def _pad(self, start: int, stop: int) -> None:
        if start < stop:
            _copy(
                [tensor[start:stop] for tensor in self._rows.tensors], [tensor[start:stop] for tensor in self._padding]
            )
        self._filled, self._num_filled = None, min(start, self._num_filled)

    def _start(self, graph: _Graph, flow: Flow) -> tuple[Tensor, list[LayerCall]]:
        """What ``Flow.start`` makes, from what the graph's own prologue made. It lasts until the next launch."""
        index = torch.arange(flow.rows.num_rows, device=self._states.device)
        size = graph.cache.num_rows
        calls = selected_calls(graph.calls, index, num_rows=size, cache=graph.cache, new_cache=flow.cache)
        return flow.hidden[None], calls


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy the tensors of a row batch: four of one dtype in one launch, then pages and lengths."""
    torch._foreach_copy_(targets[:4], sources[:4])
    for target, source in zip(targets[4:], sources[4:], strict=True):
        target.copy_(source)
