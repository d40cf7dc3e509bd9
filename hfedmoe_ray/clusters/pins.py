"""What every file of a cluster has to agree on: the version of Ray, the image, and where things lie in it."""

import re
from dataclasses import dataclass
from pathlib import Path

from hfedmoe_ray import __version__
from hfedmoe_ray.errors import ConfigError

CHECKOUT = Path(__file__).parents[2]
IN_IMAGE = "/opt/hfedmoe"
"""The checkout in the image."""
BIN = f"{IN_IMAGE}/.venv/bin"
RUNS = "/home/ray/runs"
"""Where a run's directory is in the image unless its `output` says otherwise, and where the server's volume is."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Versions that nodes must share: Ray refuses to join nodes that run different ones."""

    ray: str
    registry: str = ""
    """What goes before the image's name: the registry that nodes pull from."""

    @property
    def tag(self) -> str:
        """Of the CPU image."""
        return f"{__version__}-ray{self.ray}"

    def image(self, *, gpus: bool = False) -> str:
        """Name of the image with its tag."""
        name = f"hfedmoe-ray:{self.tag}{'-cuda' if gpus else ''}"
        return f"{self.registry.rstrip('/')}/{name}" if self.registry else name


def read_pins(registry: str = "") -> Pins:
    """The versions this checkout pins.

    Raises:
        ConfigError: the package was installed without its checkout, which every cluster file builds on.
    """
    file = CHECKOUT / "constraints-cpu.txt"
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: a cluster runs the versions that a checkout pins. Run this from a clone of the "
            "repository (pip install --editable)."
        )
    found = re.search(r"^ray==(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ConfigError(f"{file} pins no version of Ray: write a line `ray==VERSION`.")
    return Pins(ray=found[1], registry=registry)
