"""Where a policy computes: the device that a recipe names, or the best there is."""

from __future__ import annotations

import os

import torch

from posttrain.errors import RecipeError


def find_device(name: str = "auto") -> torch.device:
    """'cpu', 'cuda', 'cuda:1', or 'auto': `POSTTRAIN_DEVICE` where it is set, else a GPU where there is one. 'cuda' is this process's own
    GPU (`LOCAL_RANK`, as launchers number processes of a machine). RecipeError for a device that is not there."""
    wanted = (os.environ.get("POSTTRAIN_DEVICE") or "auto") if name == "auto" else name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda" if count else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise RecipeError("no such device", where="device", value=wanted, remedy="use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if index and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "several processes would share one GPU", where="device", value=wanted, remedy="use device=cuda: each takes its own"
        )
    place = int(index or os.environ.get("LOCAL_RANK", "0"))
    if place >= count:
        raise RecipeError(
            f"there is no such GPU: torch sees {count}",
            where="device",
            value=wanted,
            remedy="use device=cpu, or start fewer processes",
        )
    return torch.device("cuda", place)


def device_name(device: torch.device) -> str:
    """'cpu', or the GPU's own name."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def peak_device_memory_mb(device: torch.device) -> float | None:
    """Megabytes of GPU memory held at most since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return float(peak)
