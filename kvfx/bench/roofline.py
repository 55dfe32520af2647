"""Time on a GPU by CUDA-graph replay, and the rates of the device that times are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# launches in one graph: enough that the start of a replay does not count
LAUNCHES = 20
REPLAYS = 9
# sets of buffers that launches take in turns, so that none finds its operands in L2
SETS = 4
COPIED = 2**30
MATRIX = 8192

Launch = Callable[[], object]


@dataclass(frozen=True)
class Rates:
    """What a device reached in this run: bytes read and written per second by a copy, and
    floating-point operations per second by a bf16 matrix product.
    """

    copy: float
    matmul: float


def sets_beyond(l2_bytes: int, set_bytes: int) -> int:
    """How many sets of buffers are together twice as large as L2, and never fewer than `SETS`."""
    return max(SETS, -(-2 * l2_bytes // max(set_bytes, 1)))


def rounds_of(sets: int) -> int:
    """How often every set is launched in one graph: `LAUNCHES` launches or more in all."""
    return -(-LAUNCHES // sets)


def l2_bytes(device: torch.device) -> int:
    """The size of the device's last cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def replayed_us(launches: Sequence[Launch]) -> list[float]:
    """Microseconds per launch in each replay of one CUDA graph that launches all in turns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # what is compiled or loaded at the first call must not happen while a graph is captured
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds, graph = rounds_of(len(launches)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (rounds * len(launches)))
    return times


def measured_rates(device: torch.device) -> Rates:
    """The best copy and the best matrix product of this run."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(COPIED, free // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = min(replayed_us([lambda: target.copy_(source)]))
    a = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
    b = torch.randn_like(a)
    product = torch.empty_like(a)
    matmul_us = min(replayed_us([lambda: torch.mm(a, b, out=product)]))
    return Rates(copy=2 * size / copy_us * 1e6, matmul=2 * MATRIX**3 / matmul_us * 1e6)
