"""Code written for Liger's fused DPO loss, with its import replaced and nothing else."""

from __future__ import annotations

import tiny
import torch

from dpofast.integrations.liger import LigerFusedLinearDPOLoss  # was: from liger_kernel.chunked_loss import ...


def main(steps: int = 30) -> list[float]:
    policy, reference = tiny.model(), tiny.model().eval()
    dpo_loss = LigerFusedLinearDPOLoss(beta=0.1, loss_type="sigmoid")
    batch = tiny.collate(tiny.pairs(8))
    target = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        ref_hidden = reference.model(**batch).last_hidden_state[:, :-1]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        hidden = policy.model(**batch).last_hidden_state[:, :-1]
        loss, (_, _, _, _, _, chosen_rewards, rejected_rewards) = dpo_loss(
            policy.lm_head.weight,
            hidden,
            target,
            ref_input=ref_hidden,
            ref_weight=reference.lm_head.weight,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3}: loss {loss:.4f}, margin {(chosen_rewards - rejected_rewards).mean():.4f}")
    return losses


if __name__ == "__main__":
    main()
