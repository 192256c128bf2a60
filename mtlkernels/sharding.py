"""Sharding rules: the operators on DTensors, forward and backward. Importing this module registers them.

A rule says: if the arguments lie so, every rank runs the operator on its own part, and the results lie so. For every
operator the batch may be sharded, and the features it makes; for banks the experts; for sums over experts by static
weights the experts too, with partial sums. A DTensor that lies otherwise is redistributed, by DTensor, to what costs
least. What no rule can say is in :mod:`mtlkernels.exchange`: softmax over experts on several ranks, banks with unequal
units, means over rows.

``torch.distributed.tensor.experimental.register_sharding`` is experimental; rules are per mesh dimension, and torch
combines them for meshes of more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import exchange
from .ops import _operator
from .reference.expert_linear import NEED_INPUT

R, P, B = Replicate(), Partial(), Shard(0)
# Outputs and inputs in the order of the schema; None for an input that is no tensor.
Rule = tuple[list, list]


def _there(tensor: Any, placement: Any) -> Any:
    return None if tensor is None else placement


def expert_linear(x, weight, bias, counts, activation, save) -> Iterator[Rule]:
    rest = [None, None, None]
    kept = save and activation in NEED_INPUT

    def rule(y, xs, w, b) -> Rule:
        return [y, y if kept else R], [xs, w, _there(bias, b), *rest]

    yield rule(B, B, R, R)
    yield rule(Shard(2), R, Shard(1), Shard(1))
    if counts is None:
        yield rule(Shard(1), R if len(x.shape) == 2 else Shard(1), B, B)
    if activation == "" and bias is None:
        yield rule(P, Shard(len(x.shape) - 1), Shard(2), R)


def expert_linear_backward(grad, x, weight, saved, counts, activation, needs) -> Iterator[Rule]:
    def rule(outs, ins) -> Rule:
        return _needed(outs, needs), [*ins, None, None, None]

    last = Shard(len(x.shape) - 1)
    yield rule([B, P, P], [B, B, R, B])
    yield rule([P, Shard(1), Shard(1)], [Shard(2), R, Shard(1), Shard(2)])
    if counts is None:
        unit = len(x.shape) == 3
        yield rule([Shard(1) if unit else P, B, B], [Shard(1), Shard(1) if unit else R, B, Shard(1)])
    if activation == "":
        yield rule([last, Shard(2), R], [R, last, Shard(2), R])


def _needed(outs: list, needs: int) -> list:
    """What is not needed comes back empty, the same on every rank."""
    return [p if needs >> i & 1 else R for i, p in enumerate(outs)]


def _mixing(logits, static, mask, columns, native) -> Iterator[tuple]:
    """How a mix may lie: (experts, logits, static, mask, columns, out, lse, its name); experts as [B,E,D]."""
    channels = static is not None and len(static.shape) == 3
    yield B, B, R, R, R, B, B, "rows"
    yield Shard(2), R, Shard(2) if channels else R, R, R, Shard(2), R, "features"
    if columns is None and native is None:
        yield R, Shard(1), B, B, R, Shard(1), Shard(1), "tasks"
        if logits is None:
            yield Shard(1), R, Shard(1), Shard(1), R, P, R, "experts"


def mix(experts, logits, static, mask, columns, native) -> Iterator[Rule]:
    for h, lo, st, m, c, out, lse, _ in _mixing(logits, static, mask, columns, native):
        ins = [h, _there(logits, lo), _there(static, st), _there(mask, m), _there(columns, c), None]
        yield [out, R if logits is None else lse], ins


def _mix_gradients(name, st) -> tuple:
    """Of experts, logits and static, and how the gradients of out and lse must lie."""
    return {
        "rows": (B, B, P, B, B),
        "features": (Shard(2), P, st if st.is_shard() else P, Shard(2), P),
        "tasks": (P, Shard(1), B, Shard(1), Shard(1)),
        "experts": (Shard(1), R, Shard(1), R, R),
    }[name]


def mix_backward(grad, grad_lse, experts, logits, static, mask, columns, native, lse, needs) -> Iterator[Rule]:
    for h, lo, st, m, c, _, at, name in _mixing(logits, static, mask, columns, native):
        dh, dlogits, dstatic, g, glse = _mix_gradients(name, st)
        ins = [g, _there(grad_lse, glse), h, _there(logits, lo), _there(static, st), _there(mask, m)]
        ins += [_there(columns, c), None, R if logits is None else at, None]
        yield _needed([dh, dlogits, dstatic], needs), ins


def _bank_of(h, x, counts) -> tuple | None:
    """Placements of x, weight and bias that give experts [B,E,D] lying as `h`, and of their gradients."""
    if h == R:
        return (R, R, R), (P, P, P)
    if h == B:
        return (B, R, R), (B, P, P)
    if h == Shard(2):
        return (R, Shard(1), Shard(1)), (P, Shard(1), Shard(1))
    if counts is not None:
        return None
    unit = Shard(1) if len(x.shape) == 3 else R
    return (unit, B, B), (P if unit == R else unit, B, B)


def expert_mix(x, weight, bias, logits, static, mask, columns, counts, activation, saving=False) -> Iterator[Rule]:
    for h, lo, st, m, c, out, lse, _ in _mixing(logits, static, mask, columns, None):
        bank = _bank_of(h, x, counts)
        if bank is not None:
            ins = [*bank[0][:2], _there(bias, bank[0][2]), _there(logits, lo), _there(static, st), _there(mask, m)]
            outs = [out, R if logits is None else lse, *([h] if saving else [])]
            yield outs, [*ins, _there(columns, c), None, None]


def expert_mix_backward(
    grad, grad_lse, x, weight, bias, logits, static, mask, columns, counts, activation, kept, needs, saving=False
) -> Iterator[Rule]:
    for h, lo, st, m, c, _, lse, name in _mixing(logits, static, mask, columns, None):
        bank = _bank_of(h, x, counts)
        if bank is not None:
            _, dlogits, dstatic, g, glse = _mix_gradients(name, st)
            ins = [g, _there(grad_lse, glse), *bank[0][:2], _there(bias, bank[0][2]), _there(logits, lo)]
            ins += [_there(static, st), _there(mask, m), _there(columns, c), None, None]
            kept_at = h if saving else R if logits is None else lse
            yield _needed([*bank[1], dlogits, dstatic], needs), [*ins, kept_at, None]


def expert_mix_saving(*args) -> Iterator[Rule]:
    return expert_mix(*args, saving=True)


def expert_mix_saving_backward(*args) -> Iterator[Rule]:
    return expert_mix_backward(*args, saving=True)


def snr_linear(x, weight, gate, bias, activation, skip_closed, save) -> Iterator[Rule]:
    kept = save and activation in NEED_INPUT

    def rule(y, xs, w, g, b) -> Rule:
        return [y, y if kept else R], [xs, w, g, _there(bias, b), None, None, None]

    yield rule(B, B, R, R, R)
    yield rule(Shard(1), R, B, B, B)
    yield rule(Shard(2), R, Shard(2), R, Shard(1))
    if activation == "" and bias is None:
        yield rule(P, Shard(1), Shard(1), Shard(1), R)


def snr_linear_backward(grad, x, weight, gate, saved, activation, skip_closed, needs) -> Iterator[Rule]:
    def rule(outs, ins) -> Rule:
        return _needed(outs, needs), [*ins, None, None, None]

    yield rule([B, P, P, P], [B, B, R, R, B])
    yield rule([P, B, B, B], [Shard(1), R, B, B, Shard(1)])
    yield rule([P, Shard(2), P, Shard(1)], [Shard(2), R, Shard(2), R, Shard(2)])
    if activation == "":
        yield rule([Shard(1), Shard(1), Shard(1), R], [R, Shard(1), Shard(1), Shard(1), R])


def star_linear(x, domain, weight, domain_weight, bias, domain_bias, activation, save) -> Iterator[Rule]:
    kept = save and activation in NEED_INPUT

    def rule(y, xs, d, w, dw, b, db) -> Rule:
        return [y, y if kept else R], [xs, d, w, dw, _there(bias, b), _there(domain_bias, db), None, None]

    yield rule(B, B, B, R, R, R, R)
    yield rule(Shard(1), R, R, B, Shard(1), B, Shard(1))
    if activation == "" and bias is None and domain_bias is None:
        yield rule(P, Shard(1), R, Shard(1), Shard(2), R, R)


def star_linear_backward(grad, x, domain, weight, domain_weight, saved, activation, needs) -> Iterator[Rule]:
    def rule(outs, ins) -> Rule:
        return _needed(outs, needs), [*ins, None, None]

    yield rule([B, P, P, P, P], [B, B, B, R, R, B])
    yield rule([P, B, Shard(1), B, Shard(1)], [Shard(1), R, R, B, Shard(1), Shard(1)])
    if activation == "":
        yield rule([Shard(1), Shard(1), Shard(2), R, R], [R, Shard(1), R, Shard(1), Shard(2), R])


def partitioned_norm(x, domain, weight, bias, dw, db, mean, var, training, eps) -> Iterator[Rule]:
    last = Shard(1)
    yield [last] * 3 + [R], [last, R, B, B, last, last, last, last, None, None]
    # In training the statistics are of all rows of a domain: rows that lie on several ranks are gathered.
    if not training:
        yield [B, R, R, R], [B, B, R, R, R, R, R, R, None, None]


def partitioned_norm_backward(grad, x, domain, weight, dw, mean, var, count, training, eps, needs) -> Iterator[Rule]:
    def rule(outs, ins) -> Rule:
        return _needed(outs, needs), [*ins, None, None, None]

    last = Shard(1)
    yield rule([last, B, B, last, last], [last, last, R, B, last, last, last, R])
    if not training:
        yield rule([B, P, P, P, P], [B, B, B, R, R, R, R, R])


def masked_bce(logits, labels, mask) -> Iterator[Rule]:
    yield [B, Shard(1)], [Shard(1), Shard(1), _there(mask, Shard(1))]


def masked_bce_backward(grad, dlogits) -> Iterator[Rule]:
    yield [Shard(1)], [B, Shard(1)]
    yield [B], [R, B]


def esmm_loss_backward(grad, dctr, dcvr) -> Iterator[Rule]:
    yield [B, B], [R, B, B]


def hard_concrete(log_alpha, noise, beta, gamma, zeta) -> Iterator[Rule]:
    for d in range(len(log_alpha.shape)):
        yield [Shard(d), Shard(d)], [Shard(d), _there(noise, Shard(d)), None, None, None]


def hard_concrete_backward(grad, s, beta, gamma, zeta, sampled) -> Iterator[Rule]:
    for d in range(len(s.shape)):
        yield [Shard(d)], [Shard(d), Shard(d), None, None, None, None]


def hard_concrete_l0(log_alpha, beta, gamma, zeta) -> Iterator[Rule]:
    for d in range(len(log_alpha.shape)):
        yield [P, Shard(d)], [Shard(d), None, None, None]


def hard_concrete_l0_backward(grad, slope) -> Iterator[Rule]:
    for d in range(len(slope.shape)):
        yield [Shard(d)], [R, Shard(d)]


def _nothing(*args: Any) -> Iterator[Rule]:
    """Only whole arguments: a mean over rows, for one; the loss itself is in :mod:`mtlkernels.exchange`."""
    return iter(())


def _register(op: Any, rules: Callable[..., Iterator[Rule]]) -> None:
    tensors = [_is_tensor(a.type) for a in op._schema.arguments]

    def every(*args: Any) -> list[Rule]:
        args = (*args, *(None,) * (len(tensors) - len(args)))
        whole = [R if here and a is not None else None for here, a in zip(tensors, args, strict=True)]
        return [([R] * len(op._schema.returns), whole), *((list(o), list(i)) for o, i in rules(*args))]

    register_sharding(op)(every)
    # Rules depend on every plain argument; torch would keep one answer for all activations.
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    known[op].static_argnum = tensors.index(False) if False in tensors else len(tensors)


def _is_tensor(kind: Any) -> bool:
    kind = kind.getElementType() if isinstance(kind, torch.OptionalType) else kind
    return isinstance(kind, torch.TensorType)


def _register_all() -> None:
    for name, operator in _operator.Operator.all.items():
        for which in operator._forward:
            ops = torch.ops.mtlkernels_triton if which == "triton" else torch.ops.mtlkernels
            forward = globals().get(name, _nothing)
            for suffix, rules in (("", forward), ("_eager", forward), ("_backward", globals()[name + "_backward"])):
                _register(getattr(ops, name + suffix).default, rules)
    _operator.Operator.distributed = staticmethod(_run)


def _run(operator: Any, which: str, wants_grad: bool, args: tuple) -> Tensor | None:
    """A call with DTensors among its arguments; None for any other."""
    mesh = next((a.device_mesh for a in args if isinstance(a, DTensor)), None)
    if mesh is None:
        return None
    if operator.name == "mix" and isinstance(args[0], DTensor):
        if exchange.sharded_dim(args[0], 1) is not None and (args[1] is not None or args[4] is not None):
            return exchange.mix(operator, which, args)
    # Plain tensors beside DTensors are equal on all ranks: masks and routes, and tensors as a module makes them.
    args = tuple(
        DTensor.from_local(a, mesh, [R] * mesh.ndim, run_check=False)
        if isinstance(a, Tensor) and not isinstance(a, DTensor)
        else a
        for a in args
    )
    if operator.name in ("masked_bce", "esmm_loss") and exchange.sharded_dim(args[0], 0) is not None:
        return exchange.by_rows(operator, which, args)
    if operator.name == "expert_linear" and args[3] is not None and exchange.sharded_dim(args[1], 0) is not None:
        return exchange.bank(operator, which, args)
    return operator(which, wants_grad, *args, ruled=True)


_register_all()
