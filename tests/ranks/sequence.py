"""Cases of test_sequence_parallel.py, on every rank: sequences split over ranks equal sequences in one process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch.distributed.device_mesh import init_device_mesh

import dpofast

S, T, H, V = 4, 12, 16, 61


def part(kind: str) -> slice:
    """This rank's positions of each sequence: as many as the others, or none for the first, or all for the last."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = {
        "even": [T * (i + 1) // size for i in range(size)],
        "none for the first": [0, *(T * (i + 1) // (size - 1) for i in range(size - 1))],
        "one each, the rest for the last": [*range(1, size), T],
    }[kind]
    return slice(*list(itertools.pairwise([0, *shares]))[rank])


KINDS = ("even", "none for the first", "one each, the rest for the last")


def batch():
    labels = torch.randint(0, V, (S, T))
    for i, (start, stop) in enumerate(((2, 12), (0, 5), (4, 9), (3, 3))):  # the last has no label at all
        labels[i, :start] = labels[i, stop:] = -100
    return torch.randn(S, T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64), labels


def packed(x, labels, here: slice):
    """The positions ``here`` of each sequence one after the other, and where each begins."""
    rows = [x[i, here] for i in range(S)]
    return torch.cat(rows), torch.cat([labels[i, here] for i in range(S)]), torch.arange(S + 1) * len(rows[0])


def sums_of_sequences():
    for kind, pack in itertools.product(KINDS, (False, True)):
        here, (_, _, labels) = part(kind), batch()
        logps, weights = torch.randn(2, S, T)
        for options in ({}, {"average": True}, {"ld_alpha": 0.3}, {"ld_alpha": 0.3, "average": True},
                        {"token_weights": weights}):  # fmt: skip
            whole = logps.clone().requires_grad_()
            want = dpofast.sequence_logps(whole, labels, **options)
            share = torch.arange(1.0, S + 1)
            (want * share).sum().backward()
            own = logps.clone().requires_grad_()
            args = own[:, here], labels[:, here]
            more = {name: x[:, here] if torch.is_tensor(x) else x for name, x in options.items()}
            if pack:
                *args, more["cu_seqlens"] = packed(own, labels, here)
                if "token_weights" in options:
                    more["token_weights"] = packed(weights, labels, here)[0]
            got = dpofast.sequence_logps(*args, **more, group=dist.group.WORLD)
            (got * share).sum().backward()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own.grad[:, here], whole.grad[:, here], rtol=1e-5, atol=1e-5)


def dpo(here: slice, hidden, weight, labels, ref_logps=None, token_weights=None, **options):
    """Everything that a step gives: outputs, metrics, d hidden, d weight."""
    if token_weights is not None:
        options["token_weights"] = token_weights[:, here]
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    reference = {}
    if ref_logps is not None:
        reference["ref_logps"] = ref_logps[:, here] if ref_logps.ndim == 2 else ref_logps
    elif options.get("loss_type") not in ("simpo", "cpo"):
        reference = {"ref_hidden": hidden.flip(-1)[:, here], "ref_weight": weight}
    out = dpofast.linear_dpo_loss(h[:, here], w, labels[:, here], metrics=True, **reference, **options)
    out.loss.backward()
    return [x for x in out if x is not None], out.metrics(), h.grad, w.grad


def losses_of_split_sequences():
    """The same loss and metrics on every rank, its own rows of d hidden, and shares of d weight that add up."""
    for kind, options in itertools.product(KINDS, (
        {}, {"ld_alpha": 0.5}, {"use_weighting": True}, {"loss_type": "ipo"}, {"loss_type": "simpo"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5},
        {"ref_logps": torch.randn(S, T).double()}, {"ref_logps": torch.randn(S).double()},
        {"token_weights": torch.rand(S, T).double(), "loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
    )):  # fmt: skip
        here, problem = part(kind), batch()
        want, want_metrics, d_hidden, d_weight = dpo(slice(0, T), *problem, **options)
        got, metrics, own, share = dpo(here, *problem, **options, sequence_group=dist.group.WORLD)
        for ours, one in zip([*got, *metrics.values()], [*want, *want_metrics.values()], strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(own[:, here], d_hidden[:, here], rtol=1e-9, atol=1e-11)
        dist.all_reduce(share)
        torch.testing.assert_close(share, d_weight, rtol=1e-9, atol=1e-11)


def losses_of_lists_and_completions():
    """As those of pairs; ranks that group the answers differently are refused."""
    scores, good = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([True, False, False, True])
    doors = (
        (dpofast.linear_list_loss, {"sizes": [3, 1], "scores": scores, "loss_type": "lipo_lambda", "metrics": True}),
        (dpofast.linear_unpaired_loss, {"is_chosen": good, "kl": 0.1, "metrics": True}),
    )
    for kind, (loss, options) in itertools.product(KINDS, doors):
        here, (hidden, weight, labels), weights = part(kind), batch(), torch.rand(S, T).double()
        results = []
        for where, group in ((slice(0, T), None), (here, dist.group.WORLD)):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = loss(
                h[:, where], w, labels[:, where], ref_hidden=hidden.flip(-1)[:, where], ref_weight=weight,
                token_weights=weights[:, where], sequence_group=group, **options,
            )  # fmt: skip
            out.loss.backward()
            results.append(([x for x in out if x is not None], h.grad[:, here], w.grad))
        (want, d_hidden, d_weight), (got, own, share) = results
        dist.all_reduce(share)
        for ours, one in zip([*got, own, share], [*want, d_hidden, d_weight], strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-9, atol=1e-11)
    here, (hidden, weight, labels) = part("even"), batch()
    sizes = [1, 3] if dist.get_rank() == dist.get_world_size() - 1 else [3, 1]
    with pytest.raises(ValueError, match="sequence_group: its ranks 0 and .* differ in the options"):
        dpofast.linear_list_loss(hidden[:, here], weight, labels[:, here], sizes=sizes, ref_logps=torch.zeros(S),
                                 sequence_group=dist.group.WORLD)  # fmt: skip


def losses_from_logits():
    here, (hidden, weight, labels) = part("even"), batch()
    logits, reference = hidden @ weight.T, hidden.flip(1) @ weight.T
    want = dpofast.dpo_loss(logits, labels, ref_logits=reference)
    got = dpofast.dpo_loss(
        logits[:, here], labels[:, here], ref_logits=reference[:, here], sequence_group=dist.group.WORLD
    )
    torch.testing.assert_close(got.loss, want.loss)


def a_module_and_a_compiled_step():
    here, (hidden, weight, labels) = part("even"), batch()
    loss = dpofast.LinearDPOLoss(loss_type="simpo", sequence_group=dist.group.WORLD)

    def step(h, w):
        return loss(h, w, labels[:, here]).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = hidden[:, here].clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(h, w)
        value.backward()
        results.append((value.detach(), h.grad, w.grad))
    for ours, compiled in zip(*results):
        torch.testing.assert_close(ours, compiled)


def with_a_head_in_slices():
    """Sequences over one dimension of a mesh and the vocabulary over the other."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    row, column = divmod(dist.get_rank(), 2)
    here, rows = slice(row * T // 2, (row + 1) * T // 2), slice(0, 40) if column == 0 else slice(40, V)
    problem = batch()
    want, _, d_hidden, d_weight = dpo(slice(0, T), *problem, loss_type="simpo")
    hidden, weight, labels = problem
    got, _, own, share = dpo(
        here, hidden, weight[rows], labels, loss_type="simpo", sequence_group=mesh["cp"], group=mesh["tp"]
    )
    for ours, one in zip(got, want, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(own[:, here], d_hidden[:, here], rtol=1e-9, atol=1e-11)
    dist.all_reduce(share, group=mesh["cp"].get_group())
    torch.testing.assert_close(share, d_weight[rows], rtol=1e-9, atol=1e-11)


def errors_come_to_every_rank():
    rank, size = dist.get_rank(), dist.get_world_size()
    here, (hidden, weight, labels) = part("even"), batch()
    good = dict(hidden=hidden[:, here], weight=weight, labels=labels[:, here], ref_logps=torch.zeros(S),
                sequence_group=dist.group.WORLD)  # fmt: skip
    last = rank == size - 1

    def raises(match, arguments):
        with pytest.raises((TypeError, ValueError), match=match):
            dpofast.linear_dpo_loss(**arguments)

    for message, change in (
        ("labels: got 61", dict(labels=torch.full_like(good["labels"], V))),
        ("ref_logps: got shape", dict(ref_logps=torch.zeros(S + 1))),
        ("ref_logps: given beside a reference to score", dict(ref_hidden=good["hidden"], ref_weight=weight)),
        ("beta", dict(beta=-1.0)),
        ("group: got str", dict(group="no group")),
        (".*hidden without its last dimension", dict(hidden=hidden[:2, here])),
    ):
        expected = message if last else f"group: its rank {size - 1} refuses the call: {message}"
        raises(expected, {**good, **change} if last else good)
    raises("sequence_group: its ranks 0 and .* differ in the options", {**good, "ld_alpha": 0.5} if last else good)
    raises("sequence_group: its ranks 0 and .* differ in the options",
           {**good, "token_weights": torch.ones_like(good["hidden"][..., 0])} if last else good)  # fmt: skip
    fewer = dict(hidden=hidden[:2, here], labels=labels[:2, here], ref_logps=torch.zeros(2))
    raises(r"differ in the number of sequences \(4 and 2\)", {**good, **fewer} if last else good)
    raises("sequence_group: got str", {**good, "sequence_group": "world"})
    dpofast.linear_dpo_loss(**good)


CASES = {case.__name__: case for case in (
    sums_of_sequences, losses_of_split_sequences, losses_of_lists_and_completions, losses_from_logits,
    a_module_and_a_compiled_step, with_a_head_in_slices, errors_come_to_every_rank,
)}  # fmt: skip

if __name__ == "__main__":
    launch.main(CASES)
