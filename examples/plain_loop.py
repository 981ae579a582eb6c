"""DPO in a plain PyTorch loop; in Lightning, the body of the loop is ``training_step``.

The reference is scored once, before the training, and only its log-probabilities are kept.
"""

from __future__ import annotations

import tiny
import torch

from dpofast.integrations.models import model_dpo_loss, model_logprob


def main(steps: int = 30) -> list[float]:
    policy = tiny.model()
    batch = tiny.collate(tiny.pairs(8))
    labels = batch.pop("labels")
    with torch.no_grad():
        ref_logps = model_logprob(policy, batch, labels).logps
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        out = model_dpo_loss(policy, batch, labels, ref_logps=ref_logps, loss_type="sigmoid", beta=0.1, metrics=True)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 10 == 0:
            print(f"step {step:3}: loss {out.loss:.4f}, margin {out.metrics()['rewards/margins']:.4f}")
    return losses


if __name__ == "__main__":
    main()
