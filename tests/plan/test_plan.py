"""Plans: the layout's sizes against the kernels' own, the budget, the schedules, the report."""

from __future__ import annotations

import functools
import itertools
import math

import expecttest
import pytest
import torch

import dpofast
from dpofast import native
from dpofast.contract import DTYPE_CODES
from dpofast.plan import Request, choose, parse_bytes
from dpofast.plan.cpu import TRAITS, Layout

BF16, FP32 = torch.bfloat16, torch.float32
ISAS = native.cpu_isas()
KINDS = [(isa, dtype, dtype) for isa in ISAS for dtype in DTYPE_CODES] + [(ISAS[0], BF16, FP32)]


def ask(function, isa, hidden, weight, n, h, v, block, threads, as_is, **more) -> int:
    """Bytes of workspace that the kernels ask for; nothing is read, so any address will do."""
    there = 64
    args = {
        "n": n, "h": h, "v": v, "hidden": there, "hidden_dtype": DTYPE_CODES[hidden], "token_offsets": there,
        "hidden_col_stride": 1, "weight": there, "weight_dtype": DTYPE_CODES[weight],
        "weight_row_stride": h if as_is else 1, "weight_col_stride": 1 if as_is else v, "bias": None, "labels": there,
        "temperature": 1.0, "logit_scale": 1.0, "softcap": 0.0, "block": block, "threads": threads,
        "workspace": None, "workspace_bytes": 0, "logps": there, "lse": there,
    }  # fmt: skip
    return function(isa, args | more)


NO_RESULTS = dict.fromkeys(
    ("stats", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "cache", "dropped_mass")
) | {"grad_filter": 0.0, "tolerance": 0.0}


SIZES = list(itertools.product((1, 17, 64, 130, 1024), (1, 33, 64, 700), (2, 193, 3000)))


@pytest.mark.parametrize(("isa", "hidden", "weight"), KINDS)
def test_the_layout_is_the_kernels_own(isa, hidden, weight):
    """What the kernels ask for, to the byte, for any number of threads."""
    traits = TRAITS[isa, hidden, weight]
    for (n, h, v), threads, contiguous in itertools.product(SIZES, (1, 2, 3), (True, False)):
        for block in {min(b, v + v % 2) for b in (48, 96, 192, 1536)}:
            layout = {
                k: Layout(Request(n, h, v, hidden, weight, outputs=k, as_is=contiguous), traits, block, n, threads)
                for k in (0, 1, 5)
            }
            here = (isa, hidden, weight, n, h, v, block, threads, contiguous)
            for (flags, k), jacobian in itertools.product(((0, 0), (2, 1), (15, 5)), (False, True)):
                asked = ask(
                    native.C.cpu_linear_logprob_forward, *here, outputs=flags, jacobian=64 if jacobian else None,
                    cache_bytes=1 << 40, **NO_RESULTS,
                )  # fmt: skip
                assert layout[k].forward(jacobian) == asked, (here, flags, jacobian)
            for to_hidden, to_weight, recomputes, entropy in itertools.product((False, True), repeat=4):
                if not (to_hidden or to_weight) or (entropy and not recomputes):
                    continue
                for chunk in (0, 60, 700) if to_weight else (0,):
                    asked = ask(
                        native.C.cpu_linear_logprob_backward, *here, cache=None if recomputes else 64,
                        cache_bytes=layout[0].cache_per_block() * layout[0].blocks, jacobian=None,
                        entropy=64 if entropy else None, grad_entropy=64 if entropy else None, grad_logps=64,
                        grad_hidden=64 if to_hidden else None, grad_hidden_dtype=DTYPE_CODES[hidden], grad_positions=64,
                        grad_weight=64 if to_weight else None, grad_bias=64 if to_weight else None, token_chunk=chunk,
                        grad_weight_dtype=DTYPE_CODES[weight], adds=False, grad_filter=0.0,
                    )  # fmt: skip
                    wanted = to_hidden, to_weight, recomputes, entropy, chunk
                    assert layout[0].backward(*wanted) == asked, (here, wanted)


@pytest.mark.parametrize(("isa", "hidden", "weight"), KINDS)
def test_so_is_that_of_a_filter(isa, hidden, weight):
    traits = TRAITS[isa, hidden, weight]
    for (n, h, v), threads, contiguous in itertools.product(SIZES, (1, 2, 3), (True, False)):
        for block, outputs in itertools.product({min(b, v + v % 2) for b in (48, 96, 192)}, (0, 5)):
            request = Request(n, h, v, hidden, weight, outputs=outputs, as_is=contiguous, filters=True)
            layout = Layout(request, traits, block, n, threads)
            here = (isa, hidden, weight, n, h, v, block, threads, contiguous)
            filtered = NO_RESULTS | {"grad_filter": 0.1, "tolerance": 0.1, "cache": 64, "cache_bytes": 1 << 40}
            flags = 15 if outputs else 0
            asked = ask(native.C.cpu_linear_logprob_forward, *here, outputs=flags, jacobian=None, **filtered)
            assert layout.filtered_forward() == asked, here
            for to_hidden, to_weight in ((True, True), (True, False), (False, True)):
                asked = ask(
                    native.C.cpu_linear_logprob_backward, *here, cache=64, cache_bytes=1 << 40, jacobian=None,
                    entropy=None, grad_entropy=None, grad_logps=64, grad_positions=64, token_chunk=0, grad_filter=0.1,
                    grad_hidden=64 if to_hidden else None, grad_hidden_dtype=DTYPE_CODES[hidden],
                    grad_weight=64 if to_weight else None, grad_bias=None, adds=False,
                    grad_weight_dtype=DTYPE_CODES[weight],
                )  # fmt: skip
                exact = layout.backward(to_hidden, to_weight, False, False)
                assert max(layout.filtered_backward(to_hidden), exact) == asked, here


@pytest.mark.parametrize("isa", ISAS)
def test_a_jacobian_that_has_no_room_is_refused(isa):
    """Before anything is written; a cache of exponentials that is too small only holds fewer blocks."""
    sizes = isa, FP32, FP32, 5, 8, 40, 40, 1, True
    vector = TRAITS[isa, FP32, FP32].vector
    room = 8 * -(-5 // vector) * vector * 4
    forward = {"outputs": 0, "jacobian": 64, **NO_RESULTS}
    backward = dict.fromkeys(("cache", "entropy", "grad_entropy", "grad_weight", "grad_bias")) | {
        "jacobian": 64, "grad_logps": 64, "grad_hidden": 64, "grad_hidden_dtype": DTYPE_CODES[FP32],
        "grad_positions": 64, "token_chunk": 0, "grad_weight_dtype": DTYPE_CODES[FP32], "adds": False,
        "grad_filter": 0.0,
    }  # fmt: skip
    for function, more in (
        (native.C.cpu_linear_logprob_forward, forward),
        (native.C.cpu_linear_logprob_backward, backward),
    ):
        assert ask(function, *sizes, **more, cache_bytes=room) > 0
        with pytest.raises(ValueError, match="the jacobian is larger than cache_bytes"):
            ask(function, *sizes, **more, cache_bytes=room - 1)


def choose_for(n=1000, h=576, v=49152, budget=1 << 30, dtype=BF16, backend=f"cpu:{ISAS[0]}", threads=0, **wanted):
    return choose(Request(n, h, v, dtype, dtype, budget, **wanted), backend, threads)


@pytest.mark.parametrize("backend", (*(f"cpu:{isa}" for isa in ISAS), "torch"))
@pytest.mark.parametrize("train", ((False, False), (True, False), (True, True), (False, True)))
def test_no_plan_exceeds_its_budget_and_more_budget_never_costs_a_product(backend, train):
    products = {"score": 1, "jacobian": 2, "cached": 4, "mixed": 4, "recompute": 4, "recompute-split": 5}
    last = None
    for exponent in range(60, 136):
        budget = int(2 ** (exponent / 4))
        try:
            c = choose_for(budget=budget, backend=backend, to_hidden=train[0], to_weight=train[1])
        except ValueError:
            assert last is None, "a larger budget is refused where a smaller one was not"
            continue
        assert c.workspace_bytes + c.cache_bytes <= budget and c.block % 2 == 0
        assert (c.cache_bytes > 0) == (c.name in ("cached", "mixed", "jacobian"))
        assert (c.cached_share == 1) == (c.name == "cached") and 0 <= c.cached_share <= 1
        if last:
            # A wider block may come at the price of a sliver of cache.
            assert products[c.name] - c.cached_share <= products[last.name] - last.cached_share + 0.02
        last = c
    assert last.name in ("score", "jacobian", "cached")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("train", ((True, False), (True, True), (False, True)))
@pytest.mark.parametrize("n", (10, 1000, 65536))
def test_a_filter_keeps_to_the_budget_and_small_budgets_have_exact_schedules(isa, train, n):
    wanted = {"to_hidden": train[0], "to_weight": train[1]}
    names = []
    for exponent in range(80, 150):
        budget, here = int(2 ** (exponent / 4)), {"n": n, "backend": f"cpu:{isa}", **wanted}
        try:
            exact = choose_for(budget=budget, **here)
        except ValueError:
            continue
        c = choose_for(budget=budget, filters=True, **here)
        assert c.workspace_bytes + c.cache_bytes <= budget
        names.append(c.name if c.filters else c == exact)
    # Few tokens of a frozen head: reading the rows of W for entries costs more than a product.
    assert names[0] is True or n == 10
    assert names[-1] == "filtered" or (n == 10 and names[-1] is True and not train[1])


@pytest.mark.parametrize("backend", (*(f"cpu:{isa}" for isa in ISAS), "torch"))
def test_the_schedules_of_design_section_2(backend):
    choice = functools.partial(choose_for, backend=backend)
    assert choice(to_hidden=False, to_weight=False).name == "score"
    assert choice(to_weight=False).name == "jacobian"
    assert choice().name == "cached"
    assert choice(to_hidden=False).name == "cached"
    assert choice(budget=64 << 20).name == "mixed" and 0 < choice(budget=64 << 20).cached_share < 1
    assert choice(n=8000, budget=32 << 20).name in ("recompute", "recompute-split")
    assert choice(n=8000, budget=32 << 20, dtype=FP32).name in ("recompute", "recompute-split")
    small = choice(n=8000, budget=4 << 20, to_hidden=False, to_weight=False)
    assert small.name == "score" and 0 < small.token_chunk < 8000


@pytest.mark.parametrize("dtype", (BF16, FP32, torch.float16))
def test_every_instruction_set_offers_the_same_schedules(dtype):
    """What a budget buys differs by the width of a vector at most, and by what tokens are packed in."""
    for n, budget, train in itertools.product((200, 1000, 8000), (32, 64, 128, 256, 1024), (True, False)):
        choices = {
            isa: choose_for(n, budget=budget << 20, dtype=dtype, to_weight=train, backend=f"cpu:{isa}") for isa in ISAS
        }
        shares = [c.cached_share for c in choices.values()]
        assert max(shares) - min(shares) <= 0.2, (n, budget, train, choices)
        for elem in {TRAITS[isa, dtype, dtype].elem for isa in ISAS}:  # tokens are packed in 16 bits, or widened
            alike = {isa: c for isa, c in choices.items() if TRAITS[isa, dtype, dtype].elem == elem}
            assert len({c.name == "jacobian" for c in alike.values()}) == 1, (n, budget, train, alike)


@pytest.mark.parametrize("backend", (*(f"cpu:{isa}" for isa in ISAS), "torch"))
def test_a_budget_that_cannot_be_met_says_what_would_do(backend):
    with pytest.raises(
        ValueError, match=r"memory_budget: 1000 bytes cannot be met for 1000 completion tokens"
    ) as error:
        choose_for(budget=1000, backend=backend)
    needed = int(str(error.value).split("about ")[1].split(" bytes")[0])
    assert choose_for(budget=int(needed * 1.5), backend=backend).workspace_bytes <= needed * 1.5
    with pytest.raises(ValueError, match="memory_budget"):
        choose_for(budget=needed // 2, backend=backend)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (None, 1 << 30), (1, 1), (123456, 123456), ("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9),
        ("10KB", 10**4), ("10 KiB", 10240), (" 7B ", 7), ("1000", 1000), ("1e3", 1000), ("0.5MB", 500_000),
    ],
)  # fmt: skip
def test_parse_bytes(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ("", "MiB", "lots", "1TiB", "-1MiB", "0", "0.1B", "512mib", "inf", "nanGiB", "1 2", 0, -5)
)
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="memory_budget: got"):
        parse_bytes(text)


@pytest.mark.parametrize("value", (1.5, True, [1], b"1MiB"))
def test_parse_bytes_wants_an_int_or_a_string(value):
    with pytest.raises(TypeError, match="memory_budget: got"):
        parse_bytes(value)


def test_plan_reports_what_the_op_will_choose(backend):
    for options in (
        {},
        {"train_head": False},
        {"train_hidden": False, "train_head": False},
        {"memory_budget": "64MiB"},
    ):
        p = dpofast.plan(1000, 576, 49152, "bf16", backend=backend, threads=2, **options)
        c = choose_for(
            backend=backend, budget=p.memory_budget, to_hidden=options.get("train_hidden", True),
            to_weight=options.get("train_head", True), threads=2,
        )  # fmt: skip
        assert (p.schedule, p.block, p.token_chunk, p.cache_bytes, p.workspace_bytes) == c[:5]
        assert p.backend == backend and p.dtype == "bfloat16" and p.threads == 2
        assert p.floor_products <= p.products <= p.floor_products + 2
        assert (p.predicted_seconds is None) == (not backend.startswith("cpu:"))
        if p.predicted_seconds is not None:
            assert 0 < p.floor_seconds <= p.predicted_seconds < math.inf


@pytest.mark.parametrize("isa", ISAS)
def test_plan_counts_products_as_the_table_of_schedules_does(isa):
    def products(**options) -> tuple[str, float]:
        p = dpofast.plan(1000, 576, 49152, "bf16", backend=f"cpu:{isa}", threads=2, **options)
        return p.schedule, round(p.products, 6)

    assert products(train_hidden=False, train_head=False) == ("score", 1)
    assert products(train_head=False) == ("jacobian", 2)
    assert products() == ("cached", 3)
    assert products(train_hidden=False) == ("cached", 2)
    schedule, n = products(memory_budget="64MiB")
    assert schedule == "mixed" and 3 < n < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 8), "n_tokens: got 0"), ((8, 0, 8), "hidden_size: got 0"), ((8, 8, -1), "vocab_size: got -1"),
        ((8, 8, 8, "int8"), "dtype: got 'int8', expected one of fp32"),
        ((8, 8, 8, torch.int8), "dtype: got torch.int8"),
    ],
)  # fmt: skip
def test_plan_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpofast.plan(*arguments)
    with pytest.raises(ValueError, match="backend: got 'x'"):
        dpofast.plan(8, 8, 8, backend="x")
    with pytest.raises(ValueError, match="memory_budget"):
        dpofast.plan(1000, 576, 49152, memory_budget="1KiB")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cut", (None, 2.0**-9))
def test_plan_names_what_it_chose_under_any_budget(isa, cut):
    """Schedules of one name, in blocks of several sizes, may fit."""
    for mib in (1, 1.5, 2, 2.5, 3, 4, 6, 10, 16, 40):
        how = {"memory_budget": int(mib * 2**20), "grad_filter": cut, "backend": f"cpu:{isa}"}
        assert dpofast.plan(400, 40, 9000, **how).schedule in ("mixed", "cached", "filtered", "recompute")


def test_plan_prints_a_table():
    p = dpofast.plan(1000, 576, 49152, "bf16", backend="torch", threads=2, memory_budget="64MiB")
    expecttest.assert_expected_inline(
        str(p),
        """\
problem      1000 completion tokens, H 576, V 49152, bfloat16
backend      torch, 2 threads
schedule     mixed
tiles        1024 vocabulary rows a block, 1000 tokens a chunk
products     3.85 (the least for these gradients: 3)
memory       27.3 MiB cache + 35.0 MiB workspace, budget 64.0 MiB
bytes moved  2184 MiB
considered   * mixed: 3.85 products, 62.4 MiB, moves 2184 MiB
               recompute: 4.00 products, 39.0 MiB, moves 2008 MiB""",
    )
