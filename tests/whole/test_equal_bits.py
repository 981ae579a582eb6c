"""On the CPU the log-probs of a row have the same bits whatever else a call does.

Whatever else is in the batch and where the row stands in it, whichever gradients and statistics are wanted, whichever
schedule, budget and number of threads; per instruction set and version. So a reference scored in other batches is
exactly comparable, and the first step's log-ratio is exactly 0.
"""

from __future__ import annotations

import numerics
import pytest
import torch

import dpofast

N, H, V = 600, 40, 3001
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: numerics.SHORT[dtype])
def head(request):
    """Rows, a head and labels whose first logits are far below the later ones, so that maxima move on the way."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g)
    weight = torch.randn(V, H, generator=g) * torch.linspace(0.1, 2.0, V).unsqueeze(1)
    labels = torch.randint(V, (N,), generator=g)
    return hidden.to(request.param), weight.to(request.param), labels


def logps(head, backend, train=(), rows=slice(None), lead=None, **options):
    hidden, weight, labels = head
    hidden, labels = hidden[rows], labels[rows]
    if lead is not None:
        hidden, labels = hidden.reshape(*lead, H), labels.reshape(lead)
    hidden, weight = (x.detach().requires_grad_(name in train) for name, x in (("hidden", hidden), ("weight", weight)))
    return dpofast.linear_logprob(hidden, weight, labels, backend=backend, **options)


@pytest.fixture
def want(head, cpu_backend):
    return logps(head, cpu_backend).logps


def test_for_any_number_of_rows_at_any_place(head, cpu_backend, want):
    for n in (1, 2, 7, 16, 63, 64, 65, 100, 257):
        for first in {0, 5, N - n}:
            rows = slice(first, first + n)
            for train in ((), ("hidden",), ("hidden", "weight")):
                got = logps(head, cpu_backend, train, rows).logps
                assert torch.equal(got, want[rows]), (n, first, train)


@pytest.mark.parametrize(
    "schedule", ("score", "jacobian", "cached", "cached, frozen hidden")
)  # and what less memory makes of it
@pytest.mark.parametrize("threads", (1, 3))
def test_for_every_schedule_budget_and_number_of_threads(head, cpu_backend, want, schedule, threads):
    train, _ = numerics.SCHEDULES[schedule]
    seen = set()
    with numerics.threads(threads):
        for exponent in range(32, 56):  # 64 KB to 180 MB, two to an octave
            with numerics.recorded_choices() as choices:
                try:
                    got = logps(head, cpu_backend, train, memory_budget=int(2 ** (exponent / 2))).logps
                except ValueError as error:
                    assert "memory_budget" in str(error)
                    continue
            assert torch.equal(got, want), choices
            seen.update((c.name, c.block, c.token_chunk) for c in choices)
    assert len(seen) >= 2, seen


def test_whatever_statistics_are_wanted(head, cpu_backend, want):
    everything = logps(head, cpu_backend, outputs=numerics.STATISTICS)
    assert torch.equal(everything.logps, want)
    for train in ((), ("hidden",), ("hidden", "weight")):
        for name in numerics.STATISTICS:
            got = logps(head, cpu_backend, train, slice(3, 90), outputs=(name,))
            assert torch.equal(got.logps, want[3:90])
            assert torch.equal(getattr(got, name), getattr(everything, name)[3:90]), (name, train)


def test_padded_and_packed(head, cpu_backend, want):
    hidden, weight, labels = head
    padded = torch.full((3, 300), -100)
    rows = torch.zeros(3, 300, H, dtype=hidden.dtype)
    for i, (first, n, at) in enumerate(((0, 300, 0), (300, 200, 100), (500, 100, 7))):
        padded[i, at : at + n] = labels[first : first + n]
        rows[i, at : at + n] = hidden[first : first + n]
    for train in (False, True):
        got = dpofast.linear_logprob(rows, weight.detach().requires_grad_(train), padded, backend=cpu_backend).logps
        assert torch.equal(got[padded != -100], want)
    packed = dpofast.linear_logprob(hidden, weight, labels, ignore_index=None, backend=cpu_backend).logps
    assert torch.equal(packed, want)
    assert torch.equal(logps(head, cpu_backend, ("hidden",), lead=(2, N // 2)).logps.flatten(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: numerics.SHORT[dtype])
def test_the_first_log_ratio_is_exactly_zero(dtype, cpu_backend):
    """The reference was scored pair by pair, without gradients; the policy, its twin, trains on all of them."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(8, 30, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    labels = torch.randint(V, (8, 30), generator=g)
    labels[:, :9] = -100
    ref = torch.stack(
        [dpofast.linear_logprob(hidden[i], weight, labels[i], backend=cpu_backend).logps for i in range(8)]
    )
    ref = dpofast.sequence_logps(ref, labels)
    out = dpofast.linear_dpo_loss(
        hidden.requires_grad_(), weight.requires_grad_(), labels, ref_logps=ref, backend=cpu_backend
    )
    assert torch.equal(torch.cat((out.chosen_logps, out.rejected_logps)), ref)
    assert torch.equal(out.chosen_rewards, torch.zeros(4, dtype=ref.dtype))
    assert torch.equal(out.rejected_rewards, torch.zeros(4, dtype=ref.dtype))
