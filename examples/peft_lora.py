"""DPO of a LoRA adapter: the head is frozen, and the reference is the model with its adapter disabled."""

from __future__ import annotations

import tiny
import torch
from peft import LoraConfig, get_peft_model

from dpofast.integrations.models import model_dpo_loss


def main(steps: int = 30) -> list[float]:
    policy = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    batch = tiny.collate(tiny.pairs(8))
    labels = batch.pop("labels")
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(steps):
        out = model_dpo_loss(policy, batch, labels, loss_type="sigmoid", beta=0.1)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 10 == 0:
            print(f"step {step:3}: loss {out.loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
