"""Every argument of every public function, given what it cannot be: an error that names it, and never a number."""

from __future__ import annotations

import math

import numerics
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import dpofast
from dpofast import DPOLoss, LinearDPOLoss, LinearLogprob, RunningMean
from dpofast.integrations import liger, models

V, H, T = 20, 8, 3
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, BIAS = (torch.randn(*shape, generator=G) for shape in ((4, T, H), (V, H), (V,)))
LABELS = torch.randint(V, (4, T), generator=G)
LOGITS, SUMS, PAIR = HIDDEN @ WEIGHT.T, torch.zeros(4), torch.zeros(2)
PACKED = {"labels": LABELS.flatten(), "cu_seqlens": torch.tensor([0, 3, 6, 9, 12])}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with numerics.threads(1):
        yield


def alone(*names: str) -> dict[str, dict]:
    return {name: {} for name in names}


REFERENCE = {"ref_logps": None, "ref_hidden": HIDDEN, "ref_weight": WEIGHT}
# by name: the function, arguments that it always gets, and, for each argument to be spoiled, what goes with it
FUNCTIONS = {
    "linear_logprob": (
        dpofast.linear_logprob,
        {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS},
        alone("hidden", "weight", "labels", "bias"),
    ),
    "logprob": (dpofast.logprob, {"logits": LOGITS, "labels": LABELS}, alone("logits", "labels")),
    "sequence_logps": (
        dpofast.sequence_logps,
        {"logps": -LOGITS[..., 0].abs(), "labels": LABELS, "token_weights": torch.ones(4, T)},
        {
            **alone("logps", "labels", "token_weights"),
            "cu_seqlens": {**PACKED, "logps": torch.zeros(12), "token_weights": torch.ones(12)},
        },
    ),
    "linear_dpo_loss": (
        dpofast.linear_dpo_loss,
        {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS, "ref_logps": SUMS},
        {
            **alone("hidden", "weight", "labels", "bias", "ref_logps"),
            "ref_hidden": REFERENCE,
            "ref_weight": {**REFERENCE, "ref_bias": BIAS},
            "ref_bias": {**REFERENCE, "ref_bias": BIAS},
            "cu_seqlens": {**PACKED, "hidden": HIDDEN.flatten(0, 1)},
            "pair_weight": {"pair_weight": torch.ones(2)},
            "token_weights": {"token_weights": torch.ones(4, T)},
            "beta": {"beta": torch.ones(2)},
            "margin": {"margin": torch.ones(2)},
        },
    ),
    "dpo_loss": (
        dpofast.dpo_loss,
        {"logits": LOGITS, "labels": LABELS, "ref_logps": SUMS},
        {
            **alone("logits", "labels", "ref_logps"),
            "ref_logits": {"ref_logps": None, "ref_logits": LOGITS},
            "cu_seqlens": {**PACKED, "logits": LOGITS.flatten(0, 1)},
        },
    ),
    "preference_loss": (
        dpofast.preference_loss,
        {
            **{f"{side}_logps": PAIR for side in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
            "loss_type": ["sigmoid", "sft_norm"],
            "chosen_lengths": torch.ones(2),
            "rejected_lengths": torch.ones(2),
            "chosen_nll": PAIR,
        },
        {
            **alone("chosen_logps", "rejected_logps", "ref_chosen_logps", "chosen_lengths", "chosen_nll"),
            "beta": {"beta": torch.ones(2)},
            "weight": {"weight": torch.ones(2)},
        },
    ),
    "unpaired_preference_loss": (
        dpofast.unpaired_preference_loss,
        {"logps": SUMS, "ref_logps": SUMS, "is_chosen": torch.tensor([True, False] * 2), "kl": 0.0},
        alone("logps", "ref_logps", "is_chosen"),
    ),
    "list_preference_loss": (
        dpofast.list_preference_loss,
        {"logps": SUMS, "sizes": [3, 1], "ref_logps": SUMS, "scores": SUMS, "loss_type": "listnet"},
        {**alone("logps", "ref_logps"), "beta": {"beta": torch.ones(2)}, "weight": {"weight": torch.ones(2)}},
    ),
    "list_score_loss": (
        dpofast.list_score_loss,
        {"outputs": SUMS, "sizes": [3, 1], "scores": SUMS, "loss_type": "listnet"},
        alone("outputs"),
    ),
    "linear_list_loss": (
        dpofast.linear_list_loss,
        {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS, "ref_logps": SUMS, "sizes": [3, 1]},
        {
            **alone("hidden", "weight", "labels", "bias", "ref_logps"),
            "ref_hidden": REFERENCE,
            "ref_weight": {**REFERENCE, "ref_bias": BIAS},
            "cu_seqlens": {**PACKED, "hidden": HIDDEN.flatten(0, 1)},
            "list_weight": {"list_weight": torch.ones(2)},
            "token_weights": {"token_weights": torch.ones(4, T)},
            "margin": {"margin": torch.ones(2)},
        },
    ),
    "linear_unpaired_loss": (
        dpofast.linear_unpaired_loss,
        {
            **{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS, "ref_logps": SUMS},
            **{"is_chosen": torch.tensor([True, False] * 2), "loss_type": "apo_zero_unpaired"},
        },
        {
            **alone("hidden", "weight", "labels", "bias", "ref_logps", "is_chosen"),
            "cu_seqlens": {**PACKED, "hidden": HIDDEN.flatten(0, 1)},
            "sequence_weight": {"sequence_weight": torch.ones(4)},
            "token_weights": {"token_weights": torch.ones(4, T)},
        },
    ),
}
ARGUMENTS = [(name, argument) for name, (_, _, arguments) in FUNCTIONS.items() for argument in arguments]


def jagged(x: torch.Tensor, layout=torch.jagged) -> torch.Tensor:
    return torch.nested.nested_tensor([x[:1], x], layout=layout)


KINDS = {
    "list": torch.Tensor.tolist,
    "numpy": torch.Tensor.numpy,
    "str": lambda x: "tensor",
    "sparse": torch.Tensor.to_sparse,
    "csr": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "jagged": jagged,
    "nested": lambda x: jagged(x, torch.strided),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x.bool(),
    "uint8": lambda x: x.to(torch.uint8),
    "int64": lambda x: x.long(),
    "fp32": lambda x: x.float(),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "meta": lambda x: x.to("meta"),
    "one dimension more": lambda x: x.unsqueeze(0),
    "a row less": lambda x: x[1:],
    "no rows": lambda x: x[:0],
}
SPARSE = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")


def is_fine(function: str, argument: str, kind: str, value: torch.Tensor) -> bool:
    """The kinds that an argument may well be."""
    if argument.endswith("lengths"):
        return kind in ("bool", "uint8", "int64", "fp32")
    if kind == "uint8":
        return argument == "labels"
    if kind == "int64":
        return argument in ("labels", "cu_seqlens")
    if kind == "bool":
        return value.dtype == torch.bool
    return kind == "fp32" and value.is_floating_point()


@SPARSE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{f}-{a}" for f, a in ARGUMENTS])
def test_an_argument_of_the_wrong_kind_is_named(name, argument, kind):
    function, common, arguments = FUNCTIONS[name]
    given = common | arguments[argument]
    function(**given)
    value = KINDS[kind](given[argument])
    if is_fine(name, argument, kind, given[argument]):
        function(**given | {argument: value})
        return
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
        function(**given | {argument: value})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{f}-{a}" for f, a in ARGUMENTS])
def test_an_argument_on_another_device_is_named(name, argument):
    function, common, arguments = FUNCTIONS[name]
    given = common | arguments[argument]
    with FakeTensorMode(allow_non_fake_inputs=True):
        elsewhere = torch.empty_like(given[argument], device="cuda")
        with pytest.raises(ValueError, match=rf"\b{argument}\b.*got device.*cuda|got device .*where {argument} is"):
            function(**given | {argument: elsewhere})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_that_is_missing_is_named(name):
    function, common, _ = FUNCTIONS[name]
    required = [x for x in ("hidden", "weight", "labels", "logits", "logps", "chosen_logps", "rejected_logps")
                if x in common]  # fmt: skip
    for argument in required:
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
            function(**common | {argument: None})


def test_the_references_head_is_checked_before_the_policy_is_scored(monkeypatch):
    def never(*_, **__):
        raise AssertionError("scored before the arguments were checked")

    monkeypatch.setattr("dpofast._ops.call_linear_logprob", never)
    for change in ({"ref_weight": WEIGHT[:, 1:]}, {"ref_weight": WEIGHT.long()}, {"ref_bias": BIAS[1:]}):
        (argument,) = change
        with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
            dpofast.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, ref_hidden=HIDDEN, **{"ref_weight": WEIGHT} | change)


def test_labels_have_no_gradient():
    for call in (
        lambda y: dpofast.linear_logprob(HIDDEN, WEIGHT, y),
        lambda y: dpofast.linear_dpo_loss(HIDDEN, WEIGHT, y, ref_logps=SUMS),
        lambda y: dpofast.sequence_logps(LOGITS[..., 0], y),
    ):
        with pytest.raises(TypeError, match=r"labels.*torch.float32"):
            call(LABELS.float().requires_grad_())


# Options

NUMBERS = {
    "beta": {},
    "margin": {},
    "label_smoothing": {},
    "ld_alpha": {},
    "discopop_tau": {"loss_type": "discopop"},
    "dpop_lambda": {"loss_type": "dpop"},
    "simpo_gamma": {"loss_type": "simpo", "ref_logps": None},
    "cpo_alpha": {"loss_type": "cpo", "ref_logps": None},
    "alphapo_alpha": {"loss_type": "alphapo", "ref_logps": None},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "temperature": {},
    "logit_scale": {},
    "softcap": {},
}


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf, True, "1", [1.0], 1j), ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_is_refused_in_the_call_and_in_the_constructor(name, bad):
    options = NUMBERS[name]
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        dpofast.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, **{"ref_logps": SUMS} | options, **{name: bad})
    options = {key: value for key, value in options.items() if key != "ref_logps"}
    for module in (LinearDPOLoss, DPOLoss):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            module(**options, **{name: bad})


OTHERS = [
    ({"ignore_index": None}, TypeError, "ignore_index"),
    ({"ignore_index": "-100"}, TypeError, "ignore_index"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index"),
    ({"ignore_index": torch.tensor(-100)}, TypeError, "ignore_index"),
    ({"ignore_index": 1 << 63}, ValueError, "ignore_index"),
    ({"backend": None}, TypeError, "backend"),
    ({"backend": 1}, TypeError, "backend"),
    ({"loss_weights": 1.0}, TypeError, "loss_weights"),
    ({"loss_weights": [math.nan]}, ValueError, "loss_weights"),
    ({"loss_type": None}, TypeError, "loss_type"),
    ({"loss_type": []}, ValueError, "loss_type"),
    ({"reduction": None}, ValueError, "reduction"),
    ({"memory_budget": [1]}, TypeError, "memory_budget"),
    ({"outputs": ("entropy",)}, TypeError, "outputs"),  # metrics=True says it here
    ({"weight_decay": 0.1}, TypeError, "weight_decay"),
    ({"ref_logits": LOGITS}, TypeError, "ref_logits"),  # is dpo_loss's
    ({"ref_hidden": HIDDEN, "ref_weight": WEIGHT}, ValueError, "ref_logps: given beside a reference to score"),
]


@pytest.mark.parametrize(("change", "error", "message"), OTHERS, ids=[str(c)[:40] for c, _, _ in OTHERS])
def test_an_option_that_is_no_option_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        dpofast.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, **{"ref_logps": SUMS} | change)


@pytest.mark.parametrize("bad", (None, 3, "entropy", (1,)), ids=str)
def test_outputs_are_names(bad):
    for call in (
        lambda: dpofast.linear_logprob(HIDDEN, WEIGHT, LABELS, outputs=bad),
        lambda: dpofast.logprob(LOGITS, LABELS, outputs=bad),
        lambda: LinearLogprob(outputs=bad),
    ):
        with pytest.raises((TypeError, ValueError), match="outputs"):
            call()


@pytest.mark.parametrize("module", (LinearDPOLoss, DPOLoss))
def test_a_module_keeps_no_tensor_however_it_is_wrapped(module):
    for options in ({"beta": torch.ones(2)}, {"margin": {"sigmoid": torch.ones(2)}}, {"pair_weight": torch.ones(2)}):
        (name,) = options
        with pytest.raises(TypeError, match=rf"{name}: got a tensor.*pass tensors to forward"):
            module(**options)


def test_a_running_mean_takes_tensors():
    with pytest.raises(TypeError, match="rewards: got list"):
        RunningMean().update([1.0])


# Quantised heads


def quantised(kind: str) -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        head = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    else:
        storage = torch.bfloat16 if "bf16" in kind else torch.uint8
        head = bnb.nn.Linear4bit(64, 128, bias=False, quant_type=kind[:3], quant_storage=storage)
    return head.to("cpu")


BITSANDBYTES = pytest.mark.parametrize("kind", ("int8", "nf4", "fp4", "nf4 in bf16"))


@BITSANDBYTES
def test_a_weight_of_bitsandbytes_is_refused_with_a_remedy(kind):
    weight = quantised(kind).weight
    assert weight.dtype == {"int8": torch.int8, "nf4 in bf16": torch.bfloat16}.get(kind, torch.uint8)
    hidden, labels = torch.randn(4, 3, 64), torch.zeros(4, 3, dtype=torch.long)
    for name, call in {
        "weight": lambda: dpofast.linear_logprob(hidden, weight, labels),
        "ref_weight": lambda: dpofast.linear_dpo_loss(
            hidden, torch.randn(128, 64), labels, ref_hidden=hidden, ref_weight=weight
        ),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: got dtype .*; dequantise it first"):
            call()


@BITSANDBYTES
def test_a_model_whose_head_bitsandbytes_has_quantised_is_refused_with_a_remedy(kind):
    import families  # needs transformers, as bitsandbytes does not

    head = quantised(kind)
    model = families.build(vocab_size=128, hidden_size=64)
    model.lm_head = head
    labels = torch.zeros(4, 3, dtype=torch.long)
    for call in (
        lambda: models.model_logprob(model, {"input_ids": labels}, labels),
        lambda: models.model_dpo_loss(model, {"input_ids": labels}, labels, ref_logps=SUMS),
    ):
        with pytest.raises(ValueError, match=r"model: the head of LlamaForCausalLM is a Linear.*llm_int8_skip_modules"):
            call()


class Packed(torch.Tensor):
    """As torchao's quantised tensors: a subclass that says bf16, without a storage of that dtype."""

    @staticmethod
    def __new__(cls, data: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)
        self.data_int8 = data
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_int8)
        if function in (torch.ops.aten.mm.default, torch.ops.aten.t.default):
            plain = tree_map(lambda x: x.data_int8.bfloat16() if isinstance(x, Packed) else x, args)
            return function(*plain, **kwargs or {})
        return NotImplemented


def test_a_tensor_subclass_without_a_storage_never_reaches_a_kernel():
    weight = Packed(torch.ones(V, H, dtype=torch.int8))
    assert torch.mm(HIDDEN[0].bfloat16(), weight.t()).shape == (T, V)
    for function, args in ((dpofast.linear_logprob, ()), (dpofast.linear_dpo_loss, (SUMS,))):
        with pytest.raises(TypeError, match="dpofast.linear_logprob"):
            function(HIDDEN.bfloat16(), weight, LABELS, **dict(zip(("ref_logps",), args)))


# Integrations


@pytest.mark.parametrize("name", liger.__all__)
def test_ligers_names_are_in_the_errors_of_its_classes(name):
    kto = "KTO" in name
    module = getattr(liger, name)()
    common = {"lin_weight": WEIGHT, "_input": HIDDEN, "target": LABELS}
    if kto:
        common["preference_labels"] = torch.tensor([True, False] * 2)
    if "LinearDPO" in name:
        common |= {"ref_input": HIDDEN, "ref_weight": WEIGHT}
    module(**common)
    bad = [("_input", HIDDEN.tolist()), ("_input", HIDDEN[:3]), ("target", LABELS.numpy()), ("target", LABELS[0]),
           ("target", None)]  # fmt: skip
    bad += [("kl", 0.5), ("kl", torch.zeros(3)), ("preference_labels", torch.ones(4))] if kto else []
    for argument, value in bad:
        with pytest.raises((TypeError, ValueError), match=argument):
            module(**common | {argument: value})


def test_labels_of_a_model_are_a_tensor():
    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(H, V)

        def get_output_embeddings(self):
            return self.head

        def forward(self, hidden, use_cache):
            return (self.head(hidden),)

    model = Nothing()
    assert models.model_logprob(model, {"hidden": HIDDEN}, LABELS).logps.shape == (4, T - 1)
    with pytest.raises(TypeError, match="labels: got ndarray"):
        models.model_logprob(model, {"hidden": HIDDEN}, LABELS.numpy())
    with pytest.raises(ValueError, match="model: .* has no output embeddings"):
        models.model_logprob(torch.nn.Linear(H, V), {"input": HIDDEN}, LABELS)
