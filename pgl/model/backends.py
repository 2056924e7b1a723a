"""Which attention kernel runs: torch's choice, or exactly the one asked for."""

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgl import kernels
from pgl.model import flash_attention_4

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "fa3": SDPBackend.FLASH_ATTENTION,
}
"""Kernels of ``scaled_dot_product_attention``; fa4 is an operator of its own."""

# Capability of the first NVIDIA generation that has the kernel: 8 Ampere, 9 Hopper.
FIRST_GENERATION = {"cudnn": 8, "flash": 8, "fa3": 9, "fa4": 9}

QUACK_VERSION = "0.6.5"
"""The extra quack in setup.cfg; FlashAttention-4 alone brings any version of it."""

FLASH_HEAD_DIM = 256
"""Largest head dimension of the flash kernels; it has to be a multiple of 8 as well."""


def attention_kernel(backend: str) -> AbstractContextManager:
    """Context in which ``scaled_dot_product_attention`` runs on ``backend`` or raises."""
    if backend == "fa3" and nn.attention.current_flash_attention_impl() != "FA3":
        raise RuntimeError("fa3 is not active: call GPT.prepare before compiling")
    return nullcontext() if backend == "auto" else sdpa_kernel(KERNELS[backend])


def prepare_backend(backend: str, device: torch.device) -> None:
    """Make sure that ``backend`` can run on ``device``; put FlashAttention-3 in place.

    FlashAttention-3 replaces the flash kernel of the whole process, through torch's own switch
    ``torch.nn.attention.activate_flash_attention_impl``; "flash" puts torch's back.

    Raises:
        ValueError: If the device, this torch build or a missing package rules the backend out.
    """
    if backend in ("auto", "math") or (backend == "flash" and device.type == "cpu"):
        return
    if device.type != "cuda":
        raise ValueError(
            f"model.gpt.attention_backend {backend} needs a CUDA device, not {device.type}; "
            f"use auto, math or flash there"
        )
    generation, _ = torch.cuda.get_device_capability(device)
    if generation < FIRST_GENERATION[backend]:
        raise ValueError(
            f"model.gpt.attention_backend {backend} needs compute capability "
            f"{FIRST_GENERATION[backend]}.0, this device has {generation}.x; use auto"
        )
    if backend == "cudnn" and not torch.backends.cudnn.is_available():
        raise ValueError(
            "model.gpt.attention_backend cudnn needs a torch build with cuDNN; use auto"
        )
    if backend == "flash" and not torch.backends.cuda.is_flash_attention_available():
        raise ValueError(
            "model.gpt.attention_backend flash is missing in this torch build; use auto"
        )
    if backend == "fa4":
        _load_flash_attention_4()
    elif backend != "cudnn":
        _select_flash_implementation(None if backend == "flash" else "FA3")


def prepare_quack(device: torch.device) -> None:
    """Make sure that quack's products can run on ``device``.

    Raises:
        ValueError: If the device or a missing package rules it out.
    """
    if not kernels.squared_mlp_available(device):
        raise ValueError(
            "model.gpt.kernels quack needs an NVIDIA GPU of the Hopper generation (H100, H200, "
            "GH200) and Triton, which torch's CUDA builds bring along; use auto"
        )
    try:
        kernels.load_quack()
        found = version("quack-kernels")
    except ImportError as error:
        raise ValueError(
            f"model.gpt.kernels quack could not be loaded ({error}): pip install -e '.[quack]', "
            f"or use auto"
        ) from error
    if found != QUACK_VERSION:
        raise ValueError(
            f"model.gpt.kernels quack needs quack-kernels {QUACK_VERSION}, not {found}: "
            f"pip install -e '.[quack]', or use auto"
        )


def flash_reads_last(backend: str, head_dim: int, device: torch.device) -> bool:
    """Whether the flash kernel can attend from the last positions to all, in 16 bits.

    cuDNN's has no causality aligned at the bottom right. torch's operator for it trusts its caller
    in what is asked here.
    """
    if device.type != "cuda" or backend == "math":
        return False
    generation, _ = torch.cuda.get_device_capability(device)
    fits = head_dim % 8 == 0 and head_dim <= FLASH_HEAD_DIM
    built = torch.backends.cuda.is_flash_attention_available()
    return fits and built and generation >= FIRST_GENERATION["flash"]


def _load_flash_attention_4() -> None:
    try:
        flash_attention_4.load()
    except ImportError as error:
        raise ValueError(
            f"model.gpt.attention_backend fa4 could not be loaded ({error}): pip install -e "
            f"'.[fa4]', or use cudnn"
        ) from error


def _select_flash_implementation(name: str | None) -> None:
    switch = nn.attention
    if not hasattr(switch, "activate_flash_attention_impl"):
        if name is None:
            return
        raise ValueError("model.gpt.attention_backend fa3 needs torch 2.11 or newer; use auto")
    if switch.current_flash_attention_impl() == name:
        return
    if name is None:
        switch.restore_flash_attention_impl()
        return
    try:
        switch.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model.gpt.attention_backend fa3 could not be activated ({error}); install "
            f"FlashAttention-3 or use auto"
        ) from error
