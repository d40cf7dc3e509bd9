"""The device that a tier's clients stand for, as the simulated clock sees it. Torch-free."""

from pydantic import PositiveFloat

from hfedmoe_ray.config.section import Section


class SimulatedDevice(Section):
    """Peaks of a device, as its data sheet gives them (`studies/devices.py` lists some, with their sources)."""

    tflops: PositiveFloat
    """fp32 TFLOP/s of the processor that would train."""
    memory_gbps: PositiveFloat | None = None
    """GB/s of its memory. Default: memory is never what limits it."""
    down_mbps: PositiveFloat
    """Mbit/s from the server."""
    up_mbps: PositiveFloat
    """Mbit/s to the server."""
