"""Small heads that help the tasks' towers shape what they share, in training alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mtlkernels.nn import Towers

from .base import Losses


class AuxiliaryHeads(nn.Module):
    """A second, small head a task on the same representation: ``L_t + kappa L(a_t(h), y_t)`` (Wang et al., WWW 2022).

    Its gradients go into the trunk: that is what it is for. It is a module beside the model, so what the model gives,
    exports and saves is what it was without it; in evaluation :meth:`losses` is the towers' losses alone. ::

        h = model.fusion(x)
        losses = heads.losses(loss(model.towers(h)), h, loss)     # loss: outputs -> T losses
        balancer.backward(losses)

    Args:
        in_features: D.
        num_tasks: T.
        dims: widths of a head's hidden layers, () for one linear layer; keep them below the towers'.
        kappa: 0.1 to 1.
        out_features, task_names, activation, dropout, norm: as in :class:`mtlkernels.nn.Towers`; of the model's towers.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    parameter_group = "towers"

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int] = (),
        *,
        kappa: float = 0.5,
        out_features: int | Sequence[int] = 1,
        task_names: Sequence[str] | None = None,
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kappa, bool) or not isinstance(kappa, (int, float)) or not 0 <= kappa < float("inf"):
            raise ValueError(f"kappa must be finite and at least 0; got {kappa!r}")
        self.kappa, self.num_tasks = float(kappa), num_tasks
        blocks = {"activation": activation, "dropout": dropout, "norm": norm, "device": device, "dtype": dtype}
        self.heads = Towers(in_features, num_tasks, dims, out_features, task_names, **blocks)

    def forward(self, representation: Tensor) -> Tensor | dict[str, Tensor]:
        """What the towers would give, of h [B,D] shared by the tasks, or [B,T,D] of theirs."""
        if representation.dim() == 2:
            representation = representation[:, None].expand(-1, self.num_tasks, -1)
        return self.heads(representation)

    def losses(self, losses: Losses, representation: Tensor, loss: Callable[..., Losses]) -> Losses:
        """The T losses with the heads' added, of the kind that came: a tensor [T], a list or a dict.

        Args:
            losses: of the towers, as :meth:`python_models.balancing.Balancer.backward` takes them.
            representation: as :meth:`forward` takes it, in the graph.
            loss: ``loss(outputs)`` gives the heads' T losses, of the same kind and with the same labels and masks.
        """
        if not self.training:
            return losses
        extra = loss(self(representation))
        if type(extra) is not type(losses) or len(extra) != len(losses):
            raise ValueError(
                f"loss must give what losses is, {type(losses).__name__} of {len(losses)}; "
                f"got {type(extra).__name__} of {len(extra)}"
            )
        if isinstance(losses, Tensor):
            return losses + self.kappa * extra
        if isinstance(losses, dict):
            return {name: value + self.kappa * extra[name] for name, value in losses.items()}
        return [value + self.kappa * more for value, more in zip(losses, extra, strict=True)]

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}"
