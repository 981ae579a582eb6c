"""A warning: padding on the left moves the positions of a model that counts them from the padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.integrations.models.kinds import unwrapped


@contextmanager
def watching_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Warn where a model counts positions from the padding on the left: what an embedding of positions is asked for."""
    mask = inputs.get("attention_mask")
    padded = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and inputs.get("position_ids") is None:
        padded = (mask[:, 0] == 0) & (mask != 0).any(-1)
    if padded is None or not padded.any():
        yield
        return

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        index = args[0] if args else None
        if not isinstance(index, Tensor) or index.dim() not in (1, 2) or index.shape[-1] != mask.shape[1]:
            return
        rows = index if index.dim() == 2 else index[None]
        if len(rows) not in (1, len(mask)):
            return
        rows = rows.expand(mask.shape)[padded.to(rows.device)]
        if torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1], device=rows.device)):
            warnings.warn(
                f"inputs: padding on the left and no position_ids, and {type(unwrapped(model)).__name__} counts its "
                "positions from the padding, so that log-probabilities depend on it, as in the model's own loss; pass "
                "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), or pad on the right",
                stacklevel=2,
            )

    embeddings = [m for m in model.modules() if type(m).forward is nn.Embedding.forward]
    hooks = [m.register_forward_pre_hook(look) for m in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
