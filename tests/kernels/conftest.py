"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """The device whose tensors the kernels take in this process; see tests/conftest.py."""
    pytest.importorskip("triton", reason="the kernels need triton: pip install triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
