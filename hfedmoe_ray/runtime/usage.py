"""How busy this machine is: the processor from the kernel's own counters, GPUs from nvidia-smi.

Counters are differences between two looks, so that nothing runs in between where there is no GPU. What a GPU does has
no counter: a thread looks at it now and then.
"""

import shutil
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

import psutil

SAMPLE_S = 10.0
"""Between two looks at the GPUs; one costs some 50 ms of one core."""
SMI_TIMEOUT_S = 8.0
_SMI = ("--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")


class UsageMeter:
    """Measures this machine from one look to the next."""

    def __init__(self) -> None:
        """Starts to measure; where there is no nvidia-smi, nothing is heard of GPUs."""
        self._cpu = _cpu_seconds()
        smi = shutil.which("nvidia-smi")
        self._gpus = _GpuSampler(smi) if smi else None

    def read(self) -> Mapping[str, Any]:
        """The fields of `records.NodeUsage` that a machine can tell of itself, since the last look."""
        (busy_before, total_before), self._cpu = self._cpu, _cpu_seconds()
        busy, total = self._cpu
        passed = total - total_before
        percent, memory = self._gpus.take() if self._gpus else ((), ())
        return {
            "cpu_percent": round(100 * (busy - busy_before) / passed, 1) if passed > 0 else 0.0,
            "memory_percent": psutil.virtual_memory().percent,
            "gpu_percent": percent,
            "gpu_memory_percent": memory,
        }

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self._gpus:
            self._gpus.close()


def _cpu_seconds() -> tuple[float, float]:
    """Busy seconds and all seconds of all cores since this machine started."""
    times = psutil.cpu_times()
    # What virtual machines use is in `user` already; what waits for a disk is not busy.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


class _GpuSampler:
    """Asks nvidia-smi every `SAMPLE_S` seconds, in a thread, until it fails."""

    def __init__(self, smi: str) -> None:
        self._smi = smi
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._samples: list[list[tuple[float, float]]] = []
        """(percent busy, percent of memory) by GPU, a list for each look."""
        threading.Thread(target=self._sample, name="gpu-usage", daemon=True).start()

    def take(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean use and largest memory of each GPU over the looks since the last call; empty where there were none."""
        with self._lock:
            looks, self._samples = self._samples, []
        gpus = list(zip(*looks, strict=False))
        return (
            tuple(round(sum(busy for busy, _ in gpu) / len(gpu), 1) for gpu in gpus),
            tuple(round(max(memory for _, memory in gpu), 1) for gpu in gpus),
        )

    def close(self) -> None:
        self._ended.set()

    def _sample(self) -> None:
        while not self._ended.is_set():
            try:
                done = subprocess.run(
                    [self._smi, *_SMI], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
                )
                sample = read_smi(done.stdout)
            except (OSError, subprocess.SubprocessError, ValueError):
                return  # No driver, or one that does not tell: then nothing is known of GPUs.
            with self._lock:
                self._samples.append(sample)
            self._ended.wait(SAMPLE_S)


def read_smi(text: str) -> list[tuple[float, float]]:
    """(percent busy, percent of memory) of each GPU, from nvidia-smi's lines "busy, used, total".

    Raises:
        ValueError: a line holds something else, such as "[N/A]" where a GPU is split into instances.
    """
    rows = [[float(cell) for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [(busy, 100 * used / total) for busy, used, total in rows]
