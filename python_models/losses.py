"""Every task's loss by its kind, over the rows that have its label."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import mtlkernels as mtl
from mtlkernels.arguments import per_layer

Columns = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def regression(output: Tensor, label: Tensor) -> Tensor:
    """``(x - y)^2``, elementwise."""
    return (output - label).square()


def huber(output: Tensor, label: Tensor, delta: float = 1.0) -> Tensor:
    """``d^2 / 2`` of ``d = |x - y| < delta``, ``delta (d - delta / 2)`` beyond, elementwise (Huber 1964)."""
    return F.huber_loss(output, label, reduction="none", delta=delta)


def watch_time(output: Tensor, label: Tensor) -> Tensor:
    """Logistic regression weighted by the time watched, elementwise (Covington et al., RecSys 2016, section 4.2).

    ``y softplus(-x)`` for a row watched for a time y > 0, and ``softplus(x)`` for one that was not, y = 0. So the
    odds ``exp(x)`` come to ``sum y / #{y = 0}``, about the expected time where few rows are watched: serve exp(x).
    """
    return torch.where(label > 0, label * F.softplus(-output), F.softplus(output))


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {"regression": regression, "huber": huber, "watch_time": watch_time}
KINDS = ("binary", "multiclass", *_ELEMENTWISE)
REDUCTIONS = ("task_mean", "batch_mean", "sum")


class TaskLosses:
    """``(outputs, labels, mask, weights) -> [L_1, ..., L_T]``, scalars in float32 (float64 for float64).

    "task_mean" is ``L_t = sum_b w[b,t] l[b,t] / sum_b w[b,t]``, each task's mean over its own sample space (Tang et
    al., RecSys 2020, section 4.3). A task without a valid row has loss 0 and zero gradient. Where mask or weight is 0
    neither outputs nor labels are read, and may be NaN: they give no gradient, not even a NaN.

    Args:
        kinds: a word a task: "binary" (cross entropy with logits, labels in [0, 1]), "multiclass" (cross entropy with
            n logits, labels are classes), "regression" (squared error), "huber" or "watch_time", as the functions here.
            For ESMM, whose second label depends on the first, see :func:`mtlkernels.esmm_loss`.
        delta: of "huber", one number or T.
        reduction: "task_mean"; "batch_mean" divides by the B rows instead, "sum" by nothing.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at a call.
    """

    def __init__(
        self, kinds: Sequence[str], *, delta: float | Sequence[float] = 1.0, reduction: str = "task_mean"
    ) -> None:
        if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
            raise TypeError(f"kinds must be a sequence of words, one a task; got {kinds!r}")
        for t, kind in enumerate(kinds):
            if kind not in KINDS:
                raise ValueError(f"kinds[{t}] must be one of {', '.join(KINDS)}; got {kind!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
        self.kinds, self.reduction, self.num_tasks = tuple(kinds), reduction, len(kinds)
        self.delta = per_layer("delta", delta, self.num_tasks)
        for value in self.delta:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"delta must be positive and finite; got {delta!r}")

    def __call__(
        self, outputs: Columns, labels: Columns, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> list[Tensor]:
        """The T losses.

        outputs: [B,T]; or T of [B], [B,1] or, of n classes, [B,n], in a sequence or a dict in the tasks' order, as
        :class:`mtlkernels.nn.Towers` gives them. labels: [B,T]; or T of [B], under the outputs' names if in a dict.
        mask: [B,T] bool, True where there is a label. weights: finite and at least 0, [B] or [B,T].
        """
        valid = self.valid(mask, weights)
        if isinstance(outputs, Tensor) and isinstance(labels, Tensor) and set(self.kinds) == {"binary"}:
            self._columns("outputs", outputs), self._columns("labels", labels)
            return self._binary(outputs, labels, valid)
        if isinstance(outputs, Mapping) and isinstance(labels, Mapping):
            if outputs.keys() != labels.keys():
                raise ValueError(f"labels must have the keys of outputs, {list(outputs)}; got {list(labels)}")
            labels = [labels[name] for name in outputs]
        columns = zip(self._columns("outputs", outputs), self._columns("labels", labels), strict=True)
        used = [valid] * self.num_tasks if valid is None or valid.dim() == 1 else valid.unbind(1)
        return [self._one(t, out, label, used[t]) for t, (out, label) in enumerate(columns)]

    @staticmethod
    def active(mask: Tensor | None) -> Tensor | None:
        """[T] bool, the tasks with a label in this batch, as :meth:`python_models.balancing.Balancer.backward` asks.

        mask as in a call, or weights [B,T].
        """
        return None if mask is None else (mask != 0).any(0)

    def valid(self, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
        """mask and weights as one: bool or weights, [B] or [B,T]; None where all rows count alike."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor; got {what}")
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != self.num_tasks):
            raise ValueError(f"mask must be [B,T] with T = {self.num_tasks}; got shape {tuple(mask.shape)}")
        if weights is None:
            return mask
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a tensor; got {type(weights).__name__}")
        rows = weights.shape[:1] if mask is None else mask.shape[:1]
        if tuple(weights.shape) not in ((*rows,), (*rows, self.num_tasks)):
            raise ValueError(
                f"weights must be [B] or [B,T] with T = {self.num_tasks}"
                f"{'' if mask is None else f' and B = {mask.shape[0]}'}; got shape {tuple(weights.shape)}"
            )
        if mask is None:
            return weights
        return torch.where(mask, weights if weights.dim() == 2 else weights[:, None], 0)

    def _columns(self, name: str, values: Columns) -> Sequence[Tensor]:
        if isinstance(values, Tensor):
            if values.dim() != 2 or values.shape[1] != self.num_tasks:
                raise ValueError(f"{name} must be [B,T] with T = {self.num_tasks}; got shape {tuple(values.shape)}")
            return values.unbind(1)
        columns = list(values.values() if isinstance(values, Mapping) else values)
        if len(columns) != self.num_tasks:
            raise ValueError(f"{name} must be of {self.num_tasks} tasks; got {len(columns)}")
        return columns

    def _one(self, t: int, out: Tensor, label: Tensor, valid: Tensor | None) -> Tensor:
        kind, rows = self.kinds[t], out.shape[0]
        fits = (rows, out.shape[-1]) if kind == "multiclass" else (rows, 1) if out.dim() == 2 else (rows,)
        if tuple(out.shape) != fits or (kind == "multiclass" and out.dim() != 2):
            wanted = "[B,n], a logit a class" if kind == "multiclass" else "[B] or [B,1]"
            raise ValueError(f"outputs[{t}], {kind}, must be {wanted}; got shape {tuple(out.shape)}")
        for name, tensor in (("labels", label), ("mask or weights", valid)):
            if tensor is not None and tensor.shape != (rows,):
                raise ValueError(f"{name} of task {t} must be [B] with B = {rows}; got shape {tuple(tensor.shape)}")
        if kind == "binary":
            column = None if valid is None else valid[:, None]
            return self._binary(out.reshape(rows, 1), label[:, None], column)[0]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if kind != "multiclass":
            out, label = out.reshape(rows), label.to(out.dtype)
        weight = out.new_ones(rows) if valid is None else valid.to(out.dtype)
        if valid is not None:
            # Selected, not multiplied by zero: neither the value nor the gradient of what is masked is read.
            used = weight != 0
            out, label = torch.where(used[:, None] if out.dim() == 2 else used, out, 0), torch.where(used, label, 0)
        if kind == "multiclass":
            terms = F.cross_entropy(out, label.long(), reduction="none")
        elif kind == "huber":
            terms = huber(out, label, self.delta[t])
        else:
            terms = _ELEMENTWISE[kind](out, label)
        return (weight * terms).sum() / self._divisor(weight.sum(), rows)

    def _binary(self, logits: Tensor, labels: Tensor, valid: Tensor | None) -> list[Tensor]:
        """One pass of the operator for all columns."""
        if valid is not None and valid.dim() == 1:
            valid = valid[:, None].expand(-1, logits.shape[1])
        means = mtl.masked_bce(logits, labels, valid)
        if self.reduction != "task_mean":
            rows = logits.shape[0]
            total = means.new_full((logits.shape[1],), rows) if valid is None else valid.to(means.dtype).sum(0)
            means = means * (total / self._divisor(total, rows))
        return list(means.unbind())

    def _divisor(self, total: Tensor, rows: int) -> Tensor | float:
        """What sums are divided by: total [...], where it is not 0; B; or 1."""
        if self.reduction == "task_mean":
            return torch.where(total == 0, 1, total)
        return float(max(rows, 1)) if self.reduction == "batch_mean" else 1.0
