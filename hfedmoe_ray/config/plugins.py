"""Classes of the user's own: `strategy: {name: "package.module:Class"}` names one that is imported here.

Torch-free as long as the module that is named is.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.section import Section


class StrategyOptions(Section):
    """Base of the options of a strategy."""

    name: str
    """A built-in strategy, or "package.module:Class"."""


class Configurable:
    """What a configuration asks of a strategy's class: base of `hfedmoe_ray.strategies.Strategy`."""

    Options: type[StrategyOptions] = StrategyOptions
    """What else may stand in its section `strategy`, where the configuration names it by its module."""
    federated = True
    """Whether updates are averaged; if not, every client keeps its own."""
    private_router = False
    """Whether every client keeps the routers it trained and never takes the averaged ones."""
    profiles_ahead = False
    """Whether clients are profiled anew for every round they take part in: on the weights that the round before started
    from, while the server reduces that round."""


def is_plugin(name: Any) -> bool:
    """Whether a name is that of a class."""
    return isinstance(name, str) and ":" in name


def load_plugin(name: str) -> type[Configurable]:
    """Imports the strategy that `name` names.

    Raises:
        ValueError: in one sentence: it cannot be imported, or is not a strategy.
    """
    found = _imported(name, Configurable, "strategies")
    if not issubclass(found, Configurable):
        raise ValueError(f"'{name}' is no strategy: derive the class from hfedmoe_ray.strategies.Strategy")
    if not issubclass(found.Options, StrategyOptions):
        raise ValueError(
            f"{name}.Options is no section of options: derive it from hfedmoe_ray.strategies.StrategyOptions"
        )
    return found


def load_tracker(name: str) -> type[Any]:
    """Imports the tracker that `name` names (see `hfedmoe_ray.tracking.tracker.Tracker`).

    Raises:
        ValueError: in one sentence: it cannot be imported, or lacks a method.
    """
    found = _imported(name, object, "classes")
    lacking = [method for method in ("start", "event", "round", "finish") if not hasattr(found, method)]
    if lacking:
        raise ValueError(
            f"'{name}' is no tracker: it lacks {', '.join(lacking)} (see hfedmoe_ray.tracking.tracker.Tracker)"
        )
    return found


def _imported(name: str, base: type, what: str) -> type[Any]:
    """Imports a class. The working directory counts as importable, as it is for a Ray job."""
    module_name, _, class_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"'{name}' cannot be imported: there is no module {error.name}. Write package.module:Class, of a module "
            f"that is installed or lies below the working directory ({here})"
        ) from error
    except Exception as error:
        raise ValueError(f"'{name}' cannot be imported: {module_name} raises {_said(error)}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if _is_own(value, base, module_name)]
        known = f" ({what} in it: {', '.join(classes)})" if classes else ""
        raise ValueError(
            f"'{name}' cannot be used: {module_name} has no class {class_name or 'of an empty name'}{known}"
        )
    return found


def plugin_options(name: str) -> type[StrategyOptions]:
    """The section of options of the class that `name` names."""
    return load_plugin(name).Options


def plugin_source(name: str) -> Path | None:
    """The module or package below the working directory that a class comes from; None if it is installed."""
    here = Path.cwd()
    top = name.partition(":")[0].partition(".")[0]
    found = [path for path in (here / top, here / f"{top}.py") if is_plugin(name) and path.exists()]
    return found[0] if found else None


def _is_own(value: Any, base: type, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value.__module__ == module


def _said(error: Exception) -> str:
    """The error in one line, with the line of the user's file it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{place}"
