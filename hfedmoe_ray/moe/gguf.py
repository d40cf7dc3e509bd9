"""GGUF files, in which llama.cpp's models are published, as the directories that everything else here reads.

Their quantised weights are unpacked once, into fp32 safetensors in the cache: what is trained starts from the numbers
that the file stands for.
"""

import hashlib
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.errors import ModelError

_FORMAT = 1
"""Raised whenever what is written below changes."""


def unpacked(file: Path) -> Path:
    """Returns the directory of a GGUF file's model and tokenizer, made the first time: some seconds, with torch.

    Raises:
        ModelError: The package `gguf` is missing, or transformers cannot read the file.
    """
    stat = file.stat()
    facts = [_FORMAT, file.name, stat.st_size, stat.st_mtime_ns]
    directory = cache_dir() / "gguf" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    if not (directory / "config.json").is_file():
        _unpack(file, directory)
    return directory.resolve()


def _unpack(file: Path, directory: Path) -> None:
    if find_spec("gguf") is None:
        raise ModelError(
            f"model.source: {file} is a GGUF file, which the package `gguf` reads: pip install 'hfedmoe-ray[gguf]'."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfedmoe_ray.moe.quiet import quiet_transformers

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unpacking-") as temporary, quiet_transformers():
        complete = Path(temporary) / "model"
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # readers of damaged files raise whatever their parser does
            raise ModelError(
                f"model.source: {file} cannot be read as a GGUF model ({type(error).__name__}: {error}). Choose a file "
                "of a model that transformers knows, or a directory written by save_pretrained."
            ) from error
        # The weights are plain numbers now, which the model they were read into denies, and refuses to be saved.
        del model.config.quantization_config
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        shutil.rmtree(directory, ignore_errors=True)
        complete.rename(directory)
