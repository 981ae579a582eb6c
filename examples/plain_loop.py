"""DPO in a plain PyTorch loop; in Lightning, the body of the inner loop is ``training_step``.

The reference is scored once, before the training, and only its log-probabilities are kept. The loss is a mean over the
pairs of a batch, so where gradients of several batches are added up, it is divided by their number. The prompt of a
pair is run once, where that is less work.
"""

from __future__ import annotations

import tiny
import torch

from dpofast.integrations.models import model_dpo_loss, model_logprob


def main(steps: int = 30, accumulate: int = 2) -> list[float]:
    policy = tiny.model()
    rows = tiny.pairs(8)
    size = len(rows) // accumulate
    batches = [tiny.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    parts = []
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            parts.append((batch, labels, model_logprob(policy, batch, labels, share_prompt=True).logps))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        outs = []
        for inputs, labels, ref_logps in parts:
            out = model_dpo_loss(
                policy, inputs, labels, ref_logps=ref_logps, loss_type="sigmoid", beta=0.1, metrics=True,
                share_prompt=True,
            )  # fmt: skip
            (out.loss / accumulate).backward()
            outs.append(out)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(out.loss.item() for out in outs) / accumulate)
        if step % 10 == 0:
            print(f"step {step:3}: loss {losses[-1]:.4f}, margin {outs[-1].metrics()['rewards/margins']:.4f}")
    return losses


if __name__ == "__main__":
    main()
