"""Proof that training wrote no frozen tensor, from autograd's own count of in-place operations on each."""

from collections.abc import Mapping

from torch import Tensor

from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.moe.subset import SparseModel

Versions = Mapping[str, tuple[Tensor, int]]


def frozen_versions(model: SparseModel) -> Versions:
    """Takes down how often each frozen tensor of a bound model has been written so far."""
    return {name: (tensor, tensor._version) for name, tensor in model.frozen_tensors()}


def check_unwritten(frozen: Versions) -> None:
    """Raises TrainingError if one has been written since. Costs microseconds: no byte is read.

    A write that goes around torch (through NumPy, or a C extension) is not counted; between processes, page protection
    stops that too (`runtime.protect`).
    """
    for name, (tensor, version) in frozen.items():
        if tensor._version != version:
            raise TrainingError(
                f"The frozen tensor {name} was written during training. Clients of a node share such tensors, so what "
                "trains must be a copy of its own: find the in-place operation (add_, mul_, copy_, …) on it."
            )
