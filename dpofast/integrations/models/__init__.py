"""Log-probabilities and losses of a Transformers model, whatever its head does, without its logits.

Families differ in what they do between the last hidden state and the logits: a bias, a softcap, a scale under one of
half a dozen names, multiplied or divided, before the head or after it. So nothing is read from a config. The model runs
as it is, only with its head standing aside: that shows the exact hidden states that the head would have had, and
what the model makes of known logits, one row of them, shows the transform. A model that does anything else to its
logits (masks, cuts, mixes them) is refused, never approximated. What surrounds the head when the model calls it
(autocast, a LoRA adapter, trained rows) is noted in its place, and so the numbers are those of the model's own head.

A model in a wrapper (DistributedDataParallel, FSDP2, DeepSpeed) has more to it; see `wrapped.py`.

Works wherever there is a model to call: Transformers' Trainer, Lightning, a plain loop; see ``examples/``.
"""

from dpofast.integrations.models.calls import ModelLogprobOutput, model_dpo_loss, model_list_loss, model_logprob
from dpofast.integrations.models.head import find_head
from dpofast.integrations.models.probe import HeadInputs, head_inputs
from dpofast.integrations.models.sharing import patch_share_prompt, share_prompt, unpatch_share_prompt

__all__ = [
    "HeadInputs",
    "ModelLogprobOutput",
    "find_head",
    "head_inputs",
    "model_dpo_loss",
    "model_list_loss",
    "model_logprob",
    "patch_share_prompt",
    "share_prompt",
    "unpatch_share_prompt",
]
