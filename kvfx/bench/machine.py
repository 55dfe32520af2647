"""Where something was measured, and sizes as text."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

import torch

import kvfx


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, and Python's."""
    found = {package: _version(package) for package in packages}
    return {**found, "python": platform.python_version()}


def versions_text(found: dict[str, str]) -> str:
    """Versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def today() -> str:
    """The date, as 2026-11-21."""
    return datetime.datetime.now().astimezone().date().isoformat()


def bytes_text(count: float) -> str:
    """Bytes in the larger of KiB and MiB that fits."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _version(package: str) -> str:
    # a checkout has no metadata, and those of torch leave out the build
    if package == "kvfx":
        return kvfx.__version__
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
