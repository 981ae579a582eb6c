"""Counts the buffers that code makes, and its questions to a device, which on a GPU are waited for."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Watching(TorchDispatchMode):
    """Counts results of at least ``size`` elements in memory that is not an argument's, and questions to the device."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.buffers, self.waits = size, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree):
            found = torch.utils._pytree.tree_leaves(tree)
            return {x.untyped_storage().data_ptr(): x for x in found if isinstance(x, torch.Tensor)}

        results = function(*args, **(kwargs or {}))
        mine = storages(results)
        new = mine.keys() - storages((args, kwargs or {})).keys()
        self.buffers += sum(mine[pointer].numel() >= self.size for pointer in new)
        # A number asked for, a count, and a list or number made a tensor, which on a GPU is a copy that is waited for.
        if function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default):
            self.waits.append(function)
        return results
