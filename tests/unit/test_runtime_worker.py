"""A failed allocation is told from every other error, whoever reports it."""

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hfedmoe_ray.runtime.worker import out_of_memory

TOO_MUCH = 2**55


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, np.uint8),
        lambda: bytearray(TOO_MUCH),
    ],
    ids=["torch", "numpy", "python"],
)
def test_an_allocation_that_no_machine_can_serve(allocate: Callable[[], Any]):
    assert out_of_memory(raised(allocate))


def test_what_cannot_be_brought_about_here():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))


def test_other_errors_are_something_else():
    assert not out_of_memory(raised(lambda: torch.ones(2) @ torch.ones(3)))
    assert not out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not out_of_memory(ValueError("not enough memory"))
