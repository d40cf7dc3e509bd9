"""Frozen expert matrices in fewer bits than they are computed with, widened at each use.

    half   as a model published in bf16 has them: nothing is lost
    int8   per row of the stored matrix: round(127 W / max |W|), in plain torch
    nf4    bitsandbytes' 4-bit NormalFloat, one fp32 scale for 64 numbers (QLoRA, arXiv 2305.14314)

The latter two are made once, when the model is prepared, into a file beside the exact experts, and memory-mapped like
them. In that file a matrix NAME is NAME.int8 and NAME.scale, or NAME.nf4 and NAME.scale; biases are NAME, in fp32.

A matrix may also be a stack of those of several experts, with the expert as first dimension.

Legend: T tokens.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.factors import NF4_BLOCK
from hfedmoe_ray.moe.store import EXPERTS
from hfedmoe_ray.moe.tensor_file import write_tensors

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


def computing_dtype(tokens: Tensor) -> torch.dtype:
    """Returns what a product with tokens is computed in: autocast's type, else the tokens' own."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


class _Product(torch.autograd.Function):
    """tokens W^T, keeping the quantised matrix for the backward pass and not the dense one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Quantised) -> Tensor:
        dtype = computing_dtype(tokens)
        ctx.weight, ctx.dtype = weight, tokens.dtype
        dense = weight.dense(dtype)
        return tokens.to(dtype) @ (dense if weight.transposed else dense.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        dense = ctx.weight.dense(gradient.dtype)
        return (gradient @ (dense.T if ctx.weight.transposed else dense)).to(ctx.dtype), None


class Half(Quantised):
    """bf16, as published."""

    def __init__(self, values: Tensor, transposed: bool) -> None:
        """Takes `values` bf16 [rows, columns]."""
        self._values, self.transposed = values, transposed
        self.tensors = {"bf16": values}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See `Quantised`."""
        return self._values.to(dtype)

    def one(self, expert: int) -> "Half":
        """Returns the matrix in that place of a stack: a view."""
        return Half(self._values[expert], self.transposed)


class Int8(Quantised):
    """8 bits and a scale per row."""

    def __init__(self, values: Tensor, scale: Tensor, transposed: bool) -> None:
        """Takes `values` int8 [rows, columns] and `scale` fp32 [rows, 1]."""
        self._values, self._scale, self.transposed = values, scale, transposed
        self.tensors = {"int8": values, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See `Quantised`."""
        return (self._values * self._scale).to(dtype)

    def one(self, expert: int) -> "Int8":
        """Returns the matrix in that place of a stack: a view."""
        return Int8(self._values[expert], self._scale[expert], self.transposed)


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
            absmax=self._scale.flatten(),
            shape=torch.Size((self._scale.numel(), NF4_BLOCK)),
            dtype=dtype if self._values.is_cuda else torch.float32,  # no wider copy of a whole layer on the way
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            code=functional.get_4bit_type("nf4", device=self._values.device),
        )
        blocks: Tensor = functional.dequantize_4bit(self._values.reshape(-1, 1), state)
        matrices = blocks.reshape(*self._shape[:-2], -1)  # each filled up to whole blocks
        return matrices[..., : self._shape[-2:].numel()].reshape(self._shape).to(dtype)

    def one(self, expert: int) -> "NF4":
        """Returns the matrix in that place of a stack: a view."""
        return NF4(self._values[expert], self._scale[expert], self._shape[1:], self.transposed)


def file_name(form: Quantisation) -> str:
    """Returns the name of the file in a prepared model."""
    return f"experts.{form}.safetensors"


def quantise_experts(prepared: Path, form: Quantisation) -> None:
    """Writes the quantised experts of a prepared model, unless they are there.

    Raises:
        ModelError: bitsandbytes is not installed or does not run here.
    """
    require(form)
    path = prepared / file_name(form)
    if path.is_file():
        return
    tensors: dict[str, Tensor] = {}
    device = "cuda" if form == "nf4" and torch.cuda.is_available() else "cpu"  # bitsandbytes is slow on a CPU
    with safe_open(prepared / EXPERTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            dense = file.get_tensor(name).to(device).float()
            if dense.dim() == 1:
                tensors[name] = dense.cpu()
            elif form == "int8":
                tensors[f"{name}.int8"], tensors[f"{name}.scale"] = _int8(dense)
            else:
                values, state = _bitsandbytes().quantize_4bit(_blocks(dense), blocksize=NF4_BLOCK, quant_type="nf4")
                tensors[f"{name}.nf4"], tensors[f"{name}.scale"] = values.cpu(), state.absmax.cpu()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write_tensors(partial, tensors)
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


def require(form: Quantisation) -> None:
    """Raises ModelError where a form cannot be used on this machine."""
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
