"""Sharded weights: of each block's frozen weights a process holds its share, and all of them only while the block computes.

PyTorch's FSDP2 (`fully_shard`; Zhao 2023) gathers a block's weights before its forward and backward pass and lets go of them after. Every
process must therefore run the same number of passes (`Learner.forward_backward` sees to it). Embeddings, the final norm and the output
head stay whole, as the head reads them in chunks; adapters, added later and small, stay whole too and are summed like those of
unsharded processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def shard(body: Any, device: torch.device, reshard: bool) -> None:
    """Share out the weights of each block of a body (`body.layers`) over all processes.

    reshard: let go of the whole after a forward pass and gather it again for the backward one; otherwise it stays from a forward pass to
    its backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in body.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    # the body itself shares out nothing more, but as the root of its blocks it lets the next be gathered while one computes
    whole = {parameter for parameter in body.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(body, mesh=mesh, reshard_after_forward=False, ignored_params=whole)


@contextmanager
def gathered(blocks: Any, reshard: bool) -> Iterator[None]:
    """Inside, every process holds all weights and may run as many passes as it likes (without gradients). Entered and left by all."""
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(reshard)
