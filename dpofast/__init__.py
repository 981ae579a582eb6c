"""dpofast: the language-model head of preference training, fast and small."""

__version__ = "0.1.0"

from dpofast.env_info import env_info

__all__ = [
    "DPOLoss",
    "DPOLossOutput",
    "LinearDPOLoss",
    "LinearListLoss",
    "LinearLogprob",
    "LinearUnpairedLoss",
    "LogprobOutput",
    "Plan",
    "RunningMean",
    "SequenceLossOutput",
    "dpo_loss",
    "empty_cache",
    "env_info",
    "linear_dpo_loss",
    "linear_list_loss",
    "linear_logprob",
    "linear_unpaired_loss",
    "list_preference_loss",
    "list_score_loss",
    "logprob",
    "plan",
    "preference_loss",
    "sequence_logps",
    "unpaired_preference_loss",
    "wpo_weights",
]

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError) as _error:  # `python -m dpofast.env_info` has to say what is wrong
    _why = f"dpofast needs PyTorch, which cannot be imported ({_error}); install it with: pip install torch"

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(_why)
        raise AttributeError(f"module 'dpofast' has no attribute {name!r}")
else:
    from dpofast.backends._pages import empty_cache
    from dpofast.functional import DPOLossOutput, dpo_loss, linear_dpo_loss
    from dpofast.lists import list_preference_loss, list_score_loss
    from dpofast.losses import RunningMean, preference_loss, unpaired_preference_loss
    from dpofast.modules import DPOLoss, LinearDPOLoss, LinearListLoss, LinearLogprob, LinearUnpairedLoss
    from dpofast.plan.report import Plan, plan
    from dpofast.primitive import LogprobOutput, linear_logprob, logprob
    from dpofast.sequence_losses import SequenceLossOutput, linear_list_loss, linear_unpaired_loss
    from dpofast.sequences import sequence_logps, wpo_weights
