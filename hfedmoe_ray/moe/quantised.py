"""Frozen expert matrices in 8 or 4 bits, dequantised at each use.

They are quantised once, when the model is prepared, into a file beside the exact experts, and memory-mapped like them.

    int8   per row of the stored matrix: round(127 W / max |W|), in plain torch
    nf4    bitsandbytes' 4-bit NormalFloat, one fp32 scale for 64 numbers (QLoRA, arXiv 2305.14314)

In the file a matrix NAME is NAME.int8 and NAME.scale, or NAME.nf4 and NAME.scale; biases are NAME, in fp32.

Legend: T tokens.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.factors import NF4_BLOCK
from hfedmoe_ray.moe.store import EXPERTS

Quantisation = Literal["int8", "nf4"]


class Quantised(ABC):
    """A frozen matrix that is dequantised at each use, forward and backward (a `Projection`)."""

    transposed: bool
    """Whether the stored matrix is [in, out]."""
    tensors: Mapping[str, Tensor]
    """What is stored of it."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns the matrix, oriented as it is stored."""

    def project(self, tokens: Tensor) -> Tensor:
        """See `Projection`."""
        output: Tensor = _Product.apply(tokens, self)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """tokens W^T, keeping the quantised matrix for the backward pass and not the dense one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Quantised) -> Tensor:
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        ctx.weight, ctx.dtype = weight, tokens.dtype
        dense = weight.dense(dtype)
        return tokens.to(dtype) @ (dense if weight.transposed else dense.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        dense = ctx.weight.dense(gradient.dtype)
        return (gradient @ (dense.T if ctx.weight.transposed else dense)).to(ctx.dtype), None


class Int8(Quantised):
    """8 bits and a scale per row."""

    def __init__(self, values: Tensor, scale: Tensor, transposed: bool) -> None:
        """Takes `values` int8 [rows, columns] and `scale` fp32 [rows, 1]."""
        self._values, self._scale, self.transposed = values, scale, transposed
        self.tensors = {"int8": values, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See `Quantised`."""
        return (self._values * self._scale).to(dtype)


class Int4(Quantised):
    """4 bits and a scale per row."""

    def __init__(self, values: Tensor, scale: Tensor, columns: int, transposed: bool) -> None:
        """Takes `values` uint8 [rows, columns / 2], two numbers plus 8 a byte, and `scale` fp32 [rows, 1]."""
        self._values, self._scale, self._columns, self.transposed = values, scale, columns, transposed
        self.tensors = {"int4": values, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See `Quantised`."""
        halves = torch.stack([self._values & 15, self._values >> 4], dim=-1).flatten(start_dim=1)
        return ((halves[:, : self._columns].to(self._scale.dtype) - 8) * self._scale).to(dtype)


class NF4(Quantised):
    """4 bits and a scale per block."""

    def __init__(self, values: Tensor, scale: Tensor, shape: torch.Size, transposed: bool) -> None:
        """Takes `values` uint8, two numbers a byte, and `scale` fp32, one for every 64 numbers."""
        self._values, self._scale, self._shape, self.transposed = values, scale, shape, transposed
        self.tensors = {"nf4": values, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See `Quantised`."""
        functional = _bitsandbytes()
        state = functional.QuantState(
            absmax=self._scale,
            shape=torch.Size((len(self._scale), NF4_BLOCK)),
            dtype=torch.float32,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            code=functional.get_4bit_type("nf4", device=self._values.device),
        )
        blocks: Tensor = functional.dequantize_4bit(self._values, state)
        return blocks.flatten()[: self._shape.numel()].reshape(self._shape).to(dtype)


class QuantisedExperts:
    """The quantised experts of a prepared model, memory-mapped."""

    def __init__(self, path: Path, form: Quantisation, shapes: dict[str, torch.Size], transposed: bool) -> None:
        """Maps the file; `shapes` gives the shape of every dense matrix by full name."""
        self._file: Any = safe_open(path, framework="pt")
        self._form = form
        self._shapes = shapes
        self._transposed = transposed

    def weight(self, name: str, device: torch.device) -> Tensor | Quantised:
        """Returns a matrix or a bias of an expert, by "layer.expert.name"."""
        shape = self._shapes[name]
        if len(shape) == 1:
            bias: Tensor = self._file.get_tensor(name)
            return bias.to(device)
        values = self._file.get_tensor(f"{name}.{self._form}").to(device)
        scale = self._file.get_tensor(f"{name}.scale").to(device)
        if self._form == "int8":
            return Int8(values, scale, self._transposed)
        return NF4(values, scale, shape, self._transposed)


def file_name(form: Quantisation) -> str:
    """Returns the name of the file in a prepared model."""
    return f"experts.{form}.safetensors"


def open_quantised(prepared: Path, form: Quantisation, transposed: bool) -> QuantisedExperts:
    """Maps the quantised experts of a prepared model.

    Raises:
        ModelError: They are not there, or bitsandbytes is not installed or does not run here.
    """
    _require(form)
    path = prepared / file_name(form)
    if not path.is_file():
        raise ModelError(
            f"{prepared} holds no {form} experts. On another node than the one that started the run, the cache "
            "directory must be shared, or the model prepared there too ($HFEDMOE_CACHE names it)."
        )
    with safe_open(prepared / EXPERTS, framework="pt") as file:
        shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return QuantisedExperts(path, form, shapes, transposed)


def quantise_experts(prepared: Path, form: Quantisation) -> None:
    """Writes the quantised experts of a prepared model, unless they are there.

    Raises:
        ModelError: bitsandbytes is not installed or does not run here.
    """
    _require(form)
    path = prepared / file_name(form)
    if path.is_file():
        return
    tensors: dict[str, Tensor] = {}
    with safe_open(prepared / EXPERTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            dense = file.get_tensor(name)
            if dense.dim() == 1:
                tensors[name] = dense
            elif form == "int8":
                tensors[f"{name}.int8"], tensors[f"{name}.scale"] = _int8(dense)
            else:
                values, state = _bitsandbytes().quantize_4bit(_blocks(dense), blocksize=NF4_BLOCK, quant_type="nf4")
                tensors[f"{name}.nf4"], tensors[f"{name}.scale"] = values, state.absmax
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, partial)
    partial.replace(path)


def _blocks(dense: Tensor) -> Tensor:
    """Returns a matrix's numbers in rows of one block each, [blocks, NF4_BLOCK], the last filled up with zeros.

    bitsandbytes 0.50 dequantises a matrix of any other width on some CPUs by the wrong scales: off by as much as the
    largest number where rows are 96 wide.
    """
    return pad(dense.flatten(), (0, -dense.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)


def _int8(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 [rows, columns] and the scale [rows, 1] of each row; a row of zeros has scale 0."""
    scale = dense.abs().amax(dim=1, keepdim=True) / 127
    return (dense / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8), scale


def _require(form: Quantisation) -> None:
    """Raises ModelError where a form cannot be used."""
    if form == "int8":
        return
    try:
        functional = _bitsandbytes()
        values, state = functional.quantize_4bit(torch.eye(NF4_BLOCK), blocksize=NF4_BLOCK, quant_type="nf4")
        functional.dequantize_4bit(values, state)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"model.lora.base: `nf4` needs the package bitsandbytes, which is missing or does not run here ({error}). "
            "Install it with `pip install hfedmoe-ray[nf4]`, or write `base: int8`, which needs no package."
        ) from error


def _bitsandbytes() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
