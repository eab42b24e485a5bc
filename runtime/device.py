"""The way from a host tensor to a device."""

from __future__ import annotations

from typing import Any

import torch

Device = str | int | torch.device | None


def device_name(device: Device) -> Any:
    """``device`` as safetensors takes it, and with the index it would use: "cuda" is "cuda:0", None is "cpu".

    torch.device is accepted too. What is no device at all is left as it is, for safetensors to refuse.
    """
    if device is None:
        return "cpu"
    if isinstance(device, torch.device):
        device = str(device)
    if isinstance(device, str) and device in ("cuda", "musa", "npu", "xpu", "xla", "mlu", "hpu"):
        return f"{device}:0"
    return device


def to_device(tensor: torch.Tensor, device: str | int) -> torch.Tensor:
    """A copy of ``tensor`` on ``device``.

    Staged through memory of our own: a driver that copies straight from a file mapping faults it in page by page.
    """
    return tensor.clone(memory_format=torch.contiguous_format).to(device)
