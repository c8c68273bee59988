"""Where a measurement was taken: what every result says about machine, versions and model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from rag_blockcache.model import Model
from rag_blockcache.workers import num_cores

_PACKAGES = ("rag_blockcache", "torch", "transformers")


@dataclass(frozen=True)
class Environment:
    """Machine, versions and model of a measurement.

    Attributes:
        date: UTC, ISO 8601.
        hardware: Processor, cores, memory, and GPU if one was used.
        versions: Of Python and the packages that matter for speed.
        model: Name of the model, without its folder.
        device: Where it ran.
        dtype: What it computed in.
        threads: Threads that torch used on the CPU.
    """

    date: str
    hardware: Mapping[str, str]
    versions: Mapping[str, str]
    model: str
    device: str
    dtype: str
    threads: int

    @classmethod
    def of(cls, model: Model, name: str | None = None) -> Environment:
        """Describe this machine, and a model by ``name``; None takes the name in its configuration."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            hardware=_hardware(model.device),
            versions={
                "Python": platform.python_version(),
                **{package: _version(package) for package in _PACKAGES},
            },
            model=Path(name or model.network.name_or_path or type(model.network).__name__).name,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "uninstalled"


def _hardware(device: torch.device) -> dict[str, str]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": f"{num_cores()} cores",
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    description = Path("/proc/cpuinfo")
    if description.is_file():
        for line in description.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
