"""Safetensors files written tensor by tensor: a model larger than what memory has left beside it can be stored."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
"""Of the first tensor's bytes: the header is filled up with spaces, as safetensors does."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> bytes:
    """Writes tensors as a safetensors file, sorted by name, copying one at a time.

    Returns:
        SHA-256 over each tensor's file, name, shape, type and bytes.
    """
    assert sys.byteorder == "little", "safetensors are little-endian"
    header, start = {}, 0
    for name, tensor in sorted(tensors.items()):
        end = start + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in sorted(tensors.items()):
            kind = str(tensor.dtype).removeprefix("torch.")
            digest.update(f"{path.name}/{name}{tuple(tensor.shape)}{kind}".encode())
            # As bytes: NumPy has no bfloat16.
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
    return digest.digest()
