"""CONTRIBUTING's worked examples: a loss and a backend from outside, in one place each."""

from __future__ import annotations

import numerics
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dpofast
from dpofast import backends, losses
from dpofast.backends import registry
from dpofast.backends.base import Backend, InputGrads, LogitsProblem, OutputGrads, Problem, Saved
from dpofast.contract import STATISTICS
from dpofast.plan import Schedule


@pytest.fixture
def huber():
    @losses.register("Huber's, of the margin by which DPO's is missed", "huber(1 - beta D)")
    def _huber_margin(delta, *, beta):
        return F.huber_loss(beta * delta, torch.ones_like(delta), reduction="none")

    yield "huber_margin"
    del losses.LOSSES["huber_margin"]


def test_a_loss_is_one_function(huber):
    """It is there in every door, checks included."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 8, generator=g, requires_grad=True), torch.randn(20, 8, generator=g)
    labels, ref = torch.randint(20, (4, 5), generator=g), torch.randn(4, generator=g)
    out = dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=ref, loss_type=huber, beta=0.3)
    chosen, rejected = ((hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2)) - ref).chunk(2)
    want = F.huber_loss(0.3 * (chosen - rejected), torch.ones(2))
    torch.testing.assert_close(out.loss, want)
    got = torch.autograd.grad(out.loss, hidden)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, hidden)[0])
    module = dpofast.LinearDPOLoss(loss_type=[huber, "sigmoid"], loss_weights=[0.5, 0.5])
    assert module(hidden, weight, labels, ref_logps=ref).loss.isfinite()
    with pytest.raises(ValueError, match="label_smoothing: not defined for loss_type='huber_margin'"):
        dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=ref, loss_type=huber, label_smoothing=0.1)
    with pytest.raises(ValueError, match="ref_logps"):
        dpofast.linear_dpo_loss(hidden, weight, labels, loss_type=huber)


class Plain:
    """A backend of a screen: it builds the logits."""

    def cache(self, n_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def grad_weight(self, weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape)

    def forward(
        self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...], cache: Tensor
    ) -> dict[str, Tensor]:
        return self.logits_forward(self._logits(problem), outputs)

    def fold(self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...]) -> Tensor:
        raise NotImplementedError("heads in slices")

    def backward(
        self, problem: Problem, schedule: Schedule, saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        g = self._g(self._logits(problem), incoming)
        hidden = problem.hidden.reshape(-1, problem.n_hidden)[problem.positions].to(problem.wide)
        if grads.hidden is not None:
            sums = (g @ problem.weight.to(problem.wide)).to(grads.hidden.dtype)
            grads.hidden.view(-1, problem.n_hidden)[problem.positions] = sums
        if grads.weight is not None:
            grads.weight.copy_(g.T @ hidden)
        if grads.bias is not None:
            grads.bias.copy_(g.sum(0))

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        z = self._z(problem)
        log_p, z_max = z.log_softmax(-1), z.amax(-1)
        logps = log_p.gather(-1, problem.labels[:, None]).squeeze(-1)
        lse = torch.stack((z_max, z.logsumexp(-1) - z_max), -1)
        everything = {
            "entropy": -(log_p.exp() * log_p).sum(-1), "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
            "mean_logits": z.mean(-1), "is_top1": z.argmax(-1) == problem.labels,
        }  # fmt: skip
        return {"logps": logps, "lse": lse} | {name: everything[name] for name in outputs}

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        grad_logits.view(-1, problem.n_vocab)[problem.positions] = self._g(problem, incoming).to(grad_logits.dtype)

    def _g(self, problem: LogitsProblem, incoming: OutputGrads) -> Tensor:
        """The gradient of the logits, [N, V]."""
        z, (temperature, logit_scale, softcap) = self._z(problem), problem.transform
        log_p = z.log_softmax(-1)
        p, g = log_p.exp(), torch.zeros_like(z)
        if incoming.logps is not None:
            g += incoming.logps[:, None] * (F.one_hot(problem.labels, problem.n_vocab) - p)
        if incoming.entropy is not None:
            entropy = -(p * log_p).sum(-1, keepdim=True)
            g -= incoming.entropy[:, None] * p * (log_p + entropy)
        return g * (logit_scale / temperature) * (1 - (z * temperature / softcap) ** 2 if softcap else 1)

    def _logits(self, problem: Problem) -> LogitsProblem:
        hidden = problem.hidden.reshape(-1, problem.n_hidden)[problem.positions].to(problem.wide)
        logits = F.linear(hidden, problem.weight.to(problem.wide), problem.wide_bias())
        return LogitsProblem(logits, torch.arange(len(logits)), problem.labels, problem.transform)

    def _z(self, problem: LogitsProblem) -> Tensor:
        temperature, logit_scale, softcap = problem.transform
        x = problem.logits.reshape(-1, problem.n_vocab)[problem.positions].to(problem.wide) * logit_scale
        return (softcap * torch.tanh(x / softcap) if softcap else x) / temperature


@pytest.fixture
def plain():
    backends.register("plain", Plain())
    yield "plain"
    del registry.added["plain"]


@pytest.mark.parametrize("masked", (False, True))
def test_a_backend_is_one_class(plain, masked):
    assert isinstance(registry.added[plain], Backend)
    p = numerics.problem(30, 16, 90, torch.float64, entropy=True, masked=masked, **numerics.EVERYTHING)
    got = numerics.run(dpofast.linear_logprob, p, outputs=STATISTICS, backend=plain)
    want = numerics.run(dpofast.linear_logprob, p, outputs=STATISTICS, backend="torch")
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-9)
    logits, labels = torch.randn(6, 9, dtype=torch.float64, requires_grad=True), torch.arange(6)
    out = dpofast.logprob(logits, labels, backend=plain).logps
    torch.testing.assert_close(out, logits.log_softmax(-1).diagonal())
    (grad,) = torch.autograd.grad(out.sum(), logits)
    torch.testing.assert_close(grad, F.one_hot(labels, 9) - logits.detach().softmax(-1))


@pytest.mark.parametrize("name", ("", "auto", "cpu", "cpu:avx9", "torch"))
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(ValueError, match="expected one that is not among"):
        backends.register(name, Plain())
