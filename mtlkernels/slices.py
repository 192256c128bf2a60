"""A step that does not fit in memory, in slices: of the rows of a batch, or of a bank's experts.

    loss = backward_in_slices(lambda x, y: F.mse_loss(network(x), y), x, y, rows=512)
    optimizer.step()

    mixed = mix_in_slices(bank, x, logits, experts=256)  # as gated_mix(bank(x), logits)

``python -m bench plan`` says how many rows fit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .arguments import count
from .nn import ExpertMLP
from .ops import gated_mix


def backward_in_slices(loss: Callable[..., Tensor], *inputs: Tensor, rows: int, reduction: str = "mean") -> Tensor:
    """``loss(*inputs).backward()``, `rows` rows at a time: the loss, detached, and the same gradients to rounding.

    Gradients are added to what ``.grad`` holds, as backward does, once for each slice of the parameters, and once of
    the inputs that want one. An input that another module computed (an embedding, say) gets its whole gradient at the
    end, and backward goes on from there, once.

    A slice has to know nothing of the others. Where it does, results differ: batch norm takes the statistics of a
    slice, dropout draws anew, and a loss with a penalty on parameters has to have it added outside.

    Args:
        loss: of the slices of the inputs, in their order, to a scalar.
        inputs: tensors [B,...] with the same B.
        rows: of a slice, at least 1; the last one has what is left.
        reduction: of `loss` over its rows: "mean", then each slice counts by its rows, or "sum".

    Raises:
        TypeError: an input is no tensor, or rows no int.
        ValueError: no input, inputs of different B, rows below 1, an unknown reduction, or a loss that is no scalar.
    """
    batch = _batch(inputs)
    rows = count("rows", rows, 1)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}")
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    # Of slices of their own: the gradient of a view of the whole input would be a buffer as large as it, every time.
    gradients = {i: torch.zeros_like(inputs[i], memory_format=torch.contiguous_format) for i in wanted}
    total = None
    for begin in range(0, batch, rows) or (0,):  # an empty batch is one empty slice
        part = [t.detach()[begin : begin + rows].requires_grad_(t.requires_grad) for t in inputs]
        value = loss(*part)
        if value.numel() != 1:
            raise ValueError(f"loss must give a scalar; got {tuple(value.shape)}")
        if reduction == "mean" and batch:
            value = value * (len(part[0]) / batch)
        value.backward()
        for i in wanted:
            if part[i].grad is not None:
                gradients[i][begin : begin + rows] = part[i].grad
        total = value.detach() if total is None else total + value.detach()
    if wanted:
        torch.autograd.backward([inputs[i] for i in wanted], [gradients[i] for i in wanted])
    return total


@torch.no_grad()
def forward_in_slices(network: Callable[..., Tensor], *inputs: Tensor, rows: int) -> Tensor:
    """``network(*inputs)`` without gradients, `rows` rows at a time: [B,...], every slice written where it belongs.

    Args:
        network: of [b,...] tensors, to one tensor [b,...].
        inputs: tensors [B,...] with the same B.
        rows: of a slice, at least 1.

    Raises:
        TypeError, ValueError: as :func:`backward_in_slices`.
    """
    batch = _batch(inputs)
    rows = count("rows", rows, 1)
    whole = None
    for begin in range(0, batch, rows) or (0,):
        out = network(*(t[begin : begin + rows] for t in inputs))
        if whole is None:
            whole = out.new_empty(batch, *out.shape[1:])
        whole[begin : begin + rows] = out
    return whole


def mix_in_slices(bank: ExpertMLP, x: Tensor, logits: Tensor, *, experts: int) -> Tensor:
    """``gated_mix(bank(x), logits)``, `experts` experts at a time: no more of their activations are ever in memory.

    With S slices, ``z_t = sum_s softmax(l_t)_s gated_mix(bank_s(x), logits_s)_t`` and ``l_ts = logsumexp_s(logits_t)``:
    the softmax over all experts is that of the slices times that within each. Backward computes a slice's experts once
    more, with the dropout that they had.

    Args:
        bank: E experts without batch norm, whose running statistics would be taken twice.
        x: [B,K], read by every expert.
        logits: [B,T,E].
        experts: of a slice, at least 1.

    Returns:
        [B,T,D] in x's dtype, each slice's mix rounded to it.

    Raises:
        TypeError: bank is no ExpertMLP, or experts no int.
        ValueError: a bank of another kind, x or logits of another shape, or experts below 1.
    """
    if not isinstance(bank, ExpertMLP):
        raise TypeError(f"bank must be an ExpertMLP; got {type(bank).__name__}")
    experts = count("experts", experts, 1)
    if any(getattr(norm, "kind", None) == "batch" for norm in bank.norms):
        raise ValueError("bank must have no batch norm: its running statistics would be taken twice")
    if x.dim() != 2:
        raise ValueError(f"x must be [B,K], read by every expert; got {tuple(x.shape)}")
    if logits.dim() != 3 or logits.shape[2] != bank.num_experts:
        raise ValueError(f"logits must be [B,T,{bank.num_experts}]; got {tuple(logits.shape)}")
    # split and not slices: the gradient of S slices would be S zero-filled copies of every weight, added up.
    parts = {name: p.split(experts) for name, p in bank.named_parameters()}
    pieces = logits.split(experts, 2)
    wide = [piece if piece.dtype == torch.float64 else piece.float() for piece in pieces]
    shares = torch.stack([piece.logsumexp(2) for piece in wide], 2).softmax(2)
    mixed = None
    for s, piece in enumerate(pieces):
        own = {name: split[s] for name, split in parts.items()}
        z = checkpoint(_mix_of, bank, own, x, piece, use_reentrant=False) * shares[:, :, s, None]
        mixed = z if mixed is None else mixed + z
    return mixed.to(x.dtype)


def _mix_of(bank: ExpertMLP, own: dict[str, Tensor], x: Tensor, logits: Tensor) -> Tensor:
    return gated_mix(functional_call(bank, own, (x,)), logits)


def _batch(inputs: tuple[Tensor, ...]) -> int:
    if not inputs:
        raise ValueError("inputs must hold at least one tensor; got none")
    for i, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor; got {type(tensor).__name__}")
        if not tensor.dim() or len(tensor) != len(inputs[0]):
            found = [tuple(t.shape) for t in inputs]
            raise ValueError(f"inputs must have the same number of rows; got {found}")
    return len(inputs[0])
