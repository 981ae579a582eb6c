"""DPO in Lightning: ``training_step`` calls dpofast, and everything else is Lightning's.

Lightning divides what ``training_step`` returns by accumulate_grad_batches, so it gets the mean over one batch's pairs.
"""

from __future__ import annotations

import lightning
import tiny
import torch
from torch.utils.data import DataLoader

from dpofast.integrations.models import model_dpo_loss


class PreferenceModule(lightning.LightningModule):
    """Batches are ``[chosen; rejected]``, as `tiny.collate` makes them."""

    def __init__(self, model, ref_model, make_optimizer) -> None:
        super().__init__()
        self.model = model
        self.ref_model = ref_model.eval().requires_grad_(False)
        self.make_optimizer = make_optimizer
        self.losses = []

    def preference_loss(self, inputs, labels):
        return model_dpo_loss(
            self.model, inputs, labels, ref_model=self.ref_model, loss_type="sigmoid", beta=0.1, metrics=True
        )

    def step(self, batch, stage):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        out = self.preference_loss(inputs, batch["labels"])
        metrics = {"loss": out.loss.detach(), **out.metrics()}
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, batch_size=len(out.chosen_logps))
        return out.loss

    def training_step(self, batch, batch_idx):
        loss = self.step(batch, "train")
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def configure_optimizers(self):
        return self.make_optimizer(self.model.parameters())


def main(steps: int = 20) -> list[float]:
    module = PreferenceModule(tiny.model(), tiny.model(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(tiny.pairs(16), batch_size=8, collate_fn=tiny.collate))
    return module.losses


if __name__ == "__main__":
    main()
