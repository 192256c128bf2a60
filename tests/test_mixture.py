"""A bank and its mix as one node: the operators' numbers, whatever is asked of the graph, and memory that is
overwritten only where nobody can see it."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mtlkernels import mixture as mixtures
from mtlkernels.mixture import mixture
from mtlkernels.nn import ExpertMLP
from python_models import PLE, AdaTT, MMoE
from tests.ops.cases import native_only

pytestmark = native_only
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NETWORKS = {
    "AdaTT": lambda **o: AdaTT(7, 3, [2, 1, 3], 0, [[9, 5], [6]], gate_init="torch_default", **o),
    "AdaTT, one expert each": lambda **o: AdaTT(7, 3, 1, 0, [[9, 5]], gate_init="torch_default", **o),
    "AdaTT, shared": lambda **o: AdaTT(7, 2, 2, 1, [[5], [6]], gate_init="torch_default", **o),
    "MMoE": lambda **o: MMoE(7, 3, 4, [[9, 5]], gate_init="torch_default", **o),
    "PLE": lambda **o: PLE(7, 2, [1, 2], 1, [[9, 4], [5]], gate_init="torch_default", **o),
}


def network(name: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    made = NETWORKS[name](**options).to(dtype)
    rows(made, dtype)  # the first call of an operator chooses its backend
    return made


def rows(made: torch.nn.Module, dtype: torch.dtype, n: int = 70) -> torch.Tensor:
    x = torch.randn(n, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    made(x)
    return x


def gradients(made: torch.nn.Module, x: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    out = made(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return out, *torch.autograd.grad(out, [x, *made.parameters()], grad, **options)


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "_plan", lambda *args: None)


def is_one_node(out: torch.Tensor) -> bool:
    return type(out.grad_fn).__name__ == "_MixtureBackward"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("activation", [None, "relu", "tanh", "sigmoid"])
def test_gradients_are_those_of_the_operators(name, activation, monkeypatch):
    made = network(name, activation=activation)
    x = rows(made, torch.float64)
    found = gradients(made, x)
    assert is_one_node(found[0])
    one_by_one(monkeypatch)
    torch.testing.assert_close(found, gradients(made, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 63, 700])
def test_every_dtype(dtype, n, monkeypatch):
    """As exact as one by one: a gradient is rounded after its activation instead of before."""
    made = network("AdaTT", dtype, activation="tanh")
    x = rows(made, dtype, n)
    exact = gradients(copy.deepcopy(made).double(), x.detach().double().requires_grad_())
    found = gradients(made, x)
    one_by_one(monkeypatch)
    for a, b, e in zip(found, gradients(made, x), exact, strict=True):
        assert a.dtype == dtype
        scale = e.abs().max() if e.numel() else 1.0
        assert (a.double() - e).norm() <= 1.2 * (b.double() - e).norm() + 4 * torch.finfo(dtype).eps * scale


def test_no_memory_for_the_layers_gradients():
    """Of the experts' two outputs nothing but themselves is needed; the second goes before x's gradient comes."""
    bank = ExpertMLP(4, 16, [32, 16], experts_per_unit=[2, 2])
    x, logits = torch.randn(512, 2, 16, requires_grad=True), torch.randn(512, 3, 4, requires_grad=True)
    mixture(bank, x, logits)
    out = mixture(bank, x, logits)
    outputs = out.grad_fn.outputs
    places = [h.data_ptr() for h in outputs]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func._schema.name.split("::")[1], [a.data_ptr() for a in args if isinstance(a, torch.Tensor)]))
            return func(*args, **(kwargs or {}))

    del outputs
    with Watch():
        out.backward(torch.ones_like(out))
    assert dict(seen)["expert_linear_backward"][0] == places[0]
    assert out.grad_fn is None or out.grad_fn.outputs is None
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(torch.ones_like(out))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_kept_gives_the_same_again(name):
    made = network(name)
    x = rows(made, torch.float64)
    out = made(x)
    leaves, grad = [x, *made.parameters()], torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    third = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_second_derivatives():
    made = network("AdaTT", activation="tanh")
    x = rows(made, torch.float64, 5)
    assert is_one_node(made(x))
    parameters = list(made.parameters())

    def call(x, *values):
        return torch.func.functional_call(made, dict(zip(dict(made.named_parameters()), values, strict=True)), (x,))

    once = torch.autograd.grad(made(x).sum(), [x, *parameters])
    torch.testing.assert_close(torch.autograd.grad(made(x).sum(), [x, *parameters], create_graph=True), once)
    torch.autograd.gradgradcheck(call, (x.detach()[:2].requires_grad_(), *parameters))


def test_batched_gradients_and_what_follows_them():
    """is_grads_batched runs backward once for many gradients: nothing may be overwritten by the first."""
    made = network("PLE")
    x = rows(made, torch.float64, 6)
    out = made(x)
    many = torch.randn(3, *out.shape, dtype=x.dtype)
    together = torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True)[0]
    alone = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in many]
    torch.testing.assert_close(together, torch.stack(alone))
    torch.testing.assert_close(torch.func.grad(lambda x: made(x).square().sum())(x.detach()),
                               torch.autograd.grad(made(x).square().sum(), x)[0])  # fmt: skip


def test_checkpoints_and_saved_tensors_hooks_see_what_is_saved():
    made = network("AdaTT")
    x = rows(made, torch.float64)
    wanted = gradients(made, x)[1:]
    out = checkpoint(made, x, use_reentrant=False)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(torch.autograd.grad(out, [x, *made.parameters()], grad), wanted)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        out = made(x)
    assert not is_one_node(out) and (70, 6, 9) in [tuple(shape) for shape in packed]


def test_hooks_on_the_bank_are_called():
    made = network("AdaTT")
    x, seen = rows(made, torch.float64), []
    handle = made.levels[0].experts.linears[0].register_forward_hook(lambda *args: seen.append(args[2].shape))
    made(x)
    assert seen == [(70, 6, 9)]
    handle.remove()
    made.levels[0].experts.register_forward_pre_hook(lambda *args: seen.append("bank"))
    made(x)
    assert seen[1:] == ["bank"]


@pytest.mark.parametrize("frozen", ["experts", "gates", "x", "native", "first layer"])
def test_what_wants_no_gradient(frozen, monkeypatch):
    made = network("AdaTT")
    x = rows(made, torch.float64)
    for name, parameter in made.named_parameters():
        if frozen in name or (frozen == "first layer" and "linears.0" in name):
            parameter.requires_grad_(False)
    x.requires_grad_(frozen != "x")
    leaves = [t for t in (x, *made.parameters()) if t.requires_grad]
    found = torch.autograd.grad(made(x).square().sum(), leaves)
    one_by_one(monkeypatch)
    torch.testing.assert_close(found, torch.autograd.grad(made(x).square().sum(), leaves), rtol=1e-12, atol=1e-14)


def test_some_gradients_alone():
    """The graph is then used up for the others, too, as every graph is."""
    bank = ExpertMLP(4, 16, [8, 6]).double()
    x, logits = (torch.randn(9, *shape, dtype=torch.float64, requires_grad=True) for shape in ((16,), (2, 4)))
    mixture(bank, x, logits)
    everything = [x, logits, *bank.parameters()]
    wanted = torch.autograd.grad(mixture(bank, x, logits).square().sum(), everything)
    for leaf, gradient in zip(everything, wanted, strict=True):
        out = mixture(bank, x, logits)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaf)[0], gradient)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"activation": "gelu"}, {"dropout": 0.5}])
def test_other_banks_run_as_they_are(options):
    made = network("MMoE", **options)
    assert not is_one_node(made(rows(made, torch.float64)))
    with torch.no_grad():
        made(rows(made, torch.float64))


def test_bad_input_is_named_as_the_operators_do():
    bank = ExpertMLP(4, 16, [8])
    x = torch.randn(5, 16, requires_grad=True)
    mixture(bank, x, torch.randn(5, 2, 4))
    with pytest.raises(ValueError, match="logits"):
        mixture(bank, x, torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match="x has 15 features"):
        mixture(bank, x[:, 1:], torch.randn(5, 2, 4))
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.mtlkernels.mix_backward_into(
            torch.randn(5, 2, 8), torch.randn(4, 5, 8).transpose(0, 1), torch.randn(5, 2, 4), None, None, None, "", 0
        )
    with pytest.raises(RuntimeError, match="through"):
        torch.ops.mtlkernels.expert_linear_backward_into(
            torch.randn(5, 4, 8), torch.randn(5, 4, 16), torch.randn(4, 8, 16), None, "gelu", 0
        )
