"""DPO with Transformers' own Trainer: one method of it is replaced."""

from __future__ import annotations

import tempfile

import tiny
from transformers import Trainer, TrainingArguments

from dpofast.integrations.models import model_dpo_loss


class PreferenceTrainer(Trainer):
    """Batches are ``[chosen; rejected]``, as `tiny.collate` makes them."""

    def __init__(self, *args, ref_model, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # The loss below is a mean over one batch. True, as it is for most models, says that it was divided by what all
        # accumulated batches hold, and then gradients are gradient_accumulation_steps times too large.
        self.model_accepts_loss_kwargs = False
        # On the policy's device, and in its precision: with bf16=True both run under autocast.
        self.ref_model = self.accelerator.prepare_model(ref_model.eval(), evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        out = model_dpo_loss(model, inputs, labels, ref_model=self.ref_model, loss_type="sigmoid", beta=0.1)
        return (out.loss, {}) if return_outputs else out.loss


def main(steps: int = 20) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            model=tiny.model(),
            ref_model=tiny.model(),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=True,
            ),
            train_dataset=tiny.pairs(16),
            data_collator=tiny.collate,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
