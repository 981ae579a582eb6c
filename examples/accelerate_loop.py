"""DPO in a loop of Accelerate's, with accumulated gradients and whatever precision `accelerate launch` was told.

`Accelerator.backward` divides the loss by gradient_accumulation_steps, so it gets the mean over the pairs of one batch.
"""

from __future__ import annotations

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from dpofast.integrations.models import model_dpo_loss


def main(steps: int = 20, accumulate: int = 2, **options) -> list[float]:
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, **options)
    ref_model = accelerator.prepare_model(tiny.model().eval().requires_grad_(False), evaluation_mode=True)
    policy = tiny.model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batches = DataLoader(tiny.pairs(16), batch_size=8 // accumulate, collate_fn=tiny.collate)
    policy, optimizer, batches = accelerator.prepare(policy, optimizer, batches)
    losses, of_step = [], []
    while len(losses) < steps:
        for batch in batches:
            labels = batch.pop("labels")
            with accelerator.accumulate(policy):
                out = model_dpo_loss(policy, batch, labels, ref_model=ref_model, loss_type="sigmoid", beta=0.1)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            of_step.append(out.loss.item())
            if accelerator.sync_gradients:
                losses.append(sum(of_step) / len(of_step))
                of_step.clear()
                if len(losses) % 10 == 1:
                    accelerator.print(f"step {len(losses) - 1:3}: loss {losses[-1]:.4f}")
    return losses[:steps]


if __name__ == "__main__":
    main()
