"""Devices as public documents describe them, and what limits them (the roofline itself: `federation.clock`)."""

from dataclasses import dataclass

from hfedmoe_ray.federation import clock
from hfedmoe_ray.federation.clock import EFFICIENCY, MEGABIT, Work, seconds

__all__ = ["DEVICES", "EFFICIENCY", "Device", "Work", "bound", "seconds"]

_5G = (
    "ITU-R, Report M.2410-0, Minimum requirements related to technical performance for IMT-2020 radio interface(s), "
    "2017: user experienced data rate 100 Mbit/s down, 50 Mbit/s up"
)
_BROADBAND = "FCC, 2024 Section 706 Report (FCC 24-27), 2024: fixed broadband benchmark 100 Mbit/s down, 20 Mbit/s up"
_ETHERNET = "IEEE 802.3ab-1999: 1000BASE-T, 1000 Mbit/s in each direction"
_CORES = (
    "Arm, Cortex-X1 and Cortex-A78 Core Software Optimization Guides, 2020: four and two 128-bit pipes for "
    "fused multiply-add, that is 32 and 16 fp32 FLOPs a cycle"
)


@dataclass(frozen=True, kw_only=True)
class Device(clock.Device):
    """What documents say of a device."""

    name: str
    sources: tuple[str, ...]


DEVICES = (
    Device(
        name="entry phone",
        flops=2 * 16 * 2.2e9,
        bandwidth=2 * 2 * 4266e6,
        down=100 * MEGABIT,
        up=50 * MEGABIT,
        sources=(
            "Qualcomm, Snapdragon 695 5G Mobile Platform product brief, 2021: Kryo 660 up to 2.2 GHz, two "
            "performance cores derived from Cortex-A78 (the six small cores are not counted); LPDDR4X up to 2133 MHz, "
            "two 16-bit channels",
            _CORES,
            _5G,
        ),
    ),
    Device(
        name="phone",
        flops=32 * 2.84e9 + 3 * 16 * 2.42e9,
        bandwidth=4 * 2 * 6400e6,
        down=100 * MEGABIT,
        up=50 * MEGABIT,
        sources=(
            "Qualcomm, Snapdragon 888 5G Mobile Platform product brief, 2020: Kryo 680, one Cortex-X1 at 2.84 GHz and "
            "three Cortex-A78 at 2.42 GHz (the four small cores are not counted); LPDDR5 up to 3200 MHz, four 16-bit "
            "channels",
            _CORES,
            _5G,
        ),
    ),
    Device(
        name="Jetson AGX Xavier 32 GB",
        flops=2 * 512 * 1.377e9,
        bandwidth=137e9,
        down=100 * MEGABIT,
        up=50 * MEGABIT,
        sources=(
            "NVIDIA, Jetson AGX Xavier Series System-on-Module data sheet, 2018-2021: 512 Volta CUDA cores up to "
            "1377 MHz, one fused multiply-add a cycle each; 32 GB LPDDR4x, 256 bit, 137 GB/s",
            _5G,
        ),
    ),
    Device(
        name="laptop",
        flops=3.6e12,
        bandwidth=100e9,
        down=100 * MEGABIT,
        up=20 * MEGABIT,
        sources=(
            "Apple, press release 'Apple unveils M2', 6 June 2022: GPU of 10 cores, 3.6 teraflops; unified memory, "
            "100 GB/s",
            _BROADBAND,
        ),
    ),
    Device(
        name="workstation GPU",
        flops=38.7e12,
        bandwidth=768e9,
        down=1000 * MEGABIT,
        up=1000 * MEGABIT,
        sources=(
            "NVIDIA, RTX A6000 data sheet, 2020-2021: single precision 38.7 TFLOPS; 48 GB GDDR6, 768 GB/s",
            _ETHERNET,
        ),
    ),
)


def bound(device: Device, work: Work, efficiency: float = EFFICIENCY) -> str:
    """What takes most of a client's round on a device: "compute", "memory", "download" or "upload"."""
    compute, memory = work.flops / device.flops, work.traffic / device.bandwidth
    parts = {
        "compute" if compute >= memory else "memory": work.steps * max(compute, memory) / efficiency,
        "download": work.bytes_down / device.down,
        "upload": work.bytes_up / device.up,
    }
    return max(parts, key=lambda name: parts[name])
