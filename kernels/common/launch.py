"""How kernels are launched, and what is known about the machine that runs them.

Launchers call `launch.run` and `launch.machine` through this module, so that `kvfx.testing.offline`
can record what would be launched, on meta tensors, for a GPU that is not there. A launcher reads
shapes and never data: the host does not wait for the device.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
import triton

from kvfx.errors import UnsupportedShape

# enough programs for this many waves hide the ragged end of the last one
WAVES = 2
MOST_PARTS = 128


class Machine(NamedTuple):
    """What launch configurations depend on: `arch` ("sm_90", "gfx942", "interpreter") and the
    number of multiprocessors.
    """

    arch: str
    processors: int


def run(
    kernel: Any, grid: tuple[int, ...], *operands: object, warps: int, stages: int, **constants: Any
) -> None:
    """Launch `kernel` on the device of its first operand; `constants` are its constexpr
    parameters.
    """
    first = operands[0]
    assert isinstance(first, torch.Tensor)
    if first.device.type == "cpu":
        kernel[grid](*operands, **constants)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*operands, **constants, num_warps=warps, num_stages=stages)


@functools.cache
def machine(device: torch.device) -> Machine:
    """The machine behind `device`."""
    if device.type != "cuda":
        return Machine("interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Machine(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Machine(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None."""
    if device.type in ("cuda", "meta") or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton runs on CUDA and ROCm devices, not on {device} (or with TRITON_INTERPRET=1)"


def require(op: str, reason: str | None) -> None:
    """Raise UnsupportedShape if there is a reason why `op` cannot be served."""
    if reason is not None:
        raise UnsupportedShape(f"{op}: {reason}")


def with_adjacent_channels(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last axis is strided: kernels read whole rows of channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def parts(programs: int, tiles: int, processors: int, resident: int) -> int:
    """Into how many parts the entries of `programs` independent rows are split.

    A multiprocessor holds `resident` programs; `tiles` is what one row has at most. A part has two
    tiles or more, unless there are fewer.
    """
    wanted = triton.cdiv(processors * resident * WAVES, max(programs, 1))
    return max(1, min(wanted, tiles // 2, MOST_PARTS))
