"""Federated fine-tuning of Mixture-of-Experts language models on Ray.

    from hfedmoe_ray import Experiment, federate

    run = federate(Experiment.load("configs/quickstart.yaml", "rounds=2"))
    run.history, run.report(), run.model()

Names are imported when they are used, so that `import hfedmoe_ray` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment
    from hfedmoe_ray.errors import HFedMoEError
    from hfedmoe_ray.library import Run, federate, resume

__version__ = "0.1.0"
__all__ = ["Experiment", "HFedMoEError", "Run", "__version__", "federate", "resume"]

_HOMES = {
    "Experiment": "hfedmoe_ray.config.schema",
    "HFedMoEError": "hfedmoe_ray.errors",
    "Run": "hfedmoe_ray.library",
    "federate": "hfedmoe_ray.library",
    "resume": "hfedmoe_ray.library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
