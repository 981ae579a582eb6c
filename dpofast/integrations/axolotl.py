"""Axolotl's DPO and IPO runs on dpofast: a plugin, named in the run's YAML.

::

    rl: dpo
    plugins:
      - dpofast.integrations.axolotl.Plugin

Axolotl 0.19 trains with TRL 1.9, whose DPO trainer has one place for a loss that makes no logits, Liger's. The plugin
turns that on, for the loss alone and none of Liger's other kernels, and `dpofast.integrations.trl.patch` puts dpofast's
loss in the place. TRL hands it beta, the loss type and the last hidden states and nothing else, so options, and models
with a softcap or a scale, that it would drop are refused. There it logs no entropy and no token accuracy, and as mean
logits those of all positions, prompt and padding too. TRL itself refuses an adapter on the head there, and a mixture of
experts unless ``router_aux_loss_coef`` is 0.

``dpofast_share_prompt: true`` beside the plugin runs the prompt of each pair once, in policy and reference: see
docs/shared_prompt.md. The logged mean logits then count 0 at padding, where shared rows have no hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.schemas.enums import RLType
from pydantic import BaseModel
from torch import nn

__all__ = ["Arguments", "Plugin"]

_DROPPED = ("dpo_label_smoothing", "dpo_use_weighting", "dpo_loss_weights", "precompute_ref_log_probs")
_LIGER_KERNELS = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "cross_entropy", "fused_linear_cross_entropy")
"""What Liger would replace in the model itself."""


class Arguments(BaseModel):
    """What the plugin adds to a run's YAML."""

    dpofast_share_prompt: bool = False


class Plugin(BasePlugin):
    """Axolotl calls these; see `axolotl.integrations.base.BasePlugin`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{Arguments.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        # Here and not above: Axolotl prints an ImportError of a plugin's module and trains on without it.
        from trl.trainer import dpo_trainer

        from dpofast.integrations import trl

        _check(cfg)
        if not hasattr(dpo_trainer, "LigerFusedLinearDPOLoss"):
            raise ImportError(
                "trl.trainer.dpo_trainer has no LigerFusedLinearDPOLoss for this plugin to replace; expected a TRL "
                "with a Liger loss, as the trl 1.9 of axolotl 0.19 (tested), and liger-kernel to be installed; take "
                "dpofast's plugin out of plugins to train without it"
            )
        trl.patch(share_prompt=bool(cfg.dpofast_share_prompt))

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        from dpofast.integrations.models import head_inputs

        with torch.no_grad():
            head = head_inputs(model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
        if head.softcap is not None or head.logit_scale != 1.0:
            raise ValueError(
                f"base_model: {type(model).__name__} has a softcap of {head.softcap} and a scale of {head.logit_scale} "
                "behind its head, which TRL 1.9 does not pass on to a fused loss; take dpofast's plugin out of plugins"
            )

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        if cfg.dpo_use_liger_kernel:  # asked for, with all of Liger's kernels
            return {}
        return {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(_LIGER_KERNELS, False)}


def _check(cfg: Any) -> None:
    if cfg.rl not in (RLType.DPO, RLType.IPO):
        raise ValueError(f"rl: got {cfg.rl}, but dpofast's plugin serves dpo and ipo; take it out of plugins")
    for name in _DROPPED:
        if cfg[name]:
            raise ValueError(
                f"{name}: got {cfg[name]}, which TRL 1.9 does not pass on to a fused loss; drop it, or dpofast's plugin"
            )
    if cfg.dpo_loss_type and len(cfg.dpo_loss_type) > 1:
        raise ValueError(f"dpo_loss_type: got {cfg.dpo_loss_type}; with dpofast's plugin, expected a single loss")
