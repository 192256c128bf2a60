"""A fusion network and its towers as one model."""

import copy
from typing import Any

from torch import Tensor, nn

from mtlkernels.nn import Towers

from .serving import serving_bank

__all__ = ["MultiTaskModel", "Towers"]


class MultiTaskModel(nn.Module):
    """``towers(fusion(x))``: features to [B,T] logits, or {name: [B,n]}.

    Args:
        fusion: [B,K] -> [B,T,D], any network of this package.
        towers: [B,T,D] -> outputs, as :class:`mtlkernels.nn.Towers`.

    ``return_gates=True`` gives ``(outputs, gates)``, where fusion has gates: a list of [B,rows,E], one a level. They
    come from the same pass and carry gradients, for a loss on them.

    Raises:
        TypeError: fusion or towers is not a module.
        ValueError: both state their tasks or widths, and these differ.
    """

    def __init__(self, fusion: nn.Module, towers: nn.Module) -> None:
        super().__init__()
        for name, module in (("fusion", fusion), ("towers", towers)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a module; got {type(module).__name__}")
        for given, read in (("out_features", "in_features"), ("num_tasks", "num_tasks")):
            a, b = getattr(fusion, given, None), getattr(towers, read, None)
            if a is not None and b is not None and a != b:
                raise ValueError(f"towers has {read}={b}, fusion has {given}={a}: they must agree")
        self.fusion, self.towers = fusion, towers

    def forward(self, x: Tensor, *, return_gates: bool = False) -> Any:
        if not return_gates:
            return self.towers(self.fusion(x))
        h, gates = self.fusion(x, return_gates=True)
        return self.towers(h), gates

    def for_serving(self, *args: Any, **options: Any) -> "MultiTaskModel":
        """What is deployed, a copy in evaluation mode: the fusion's ``for_serving``, where it has one, and the towers.

        The arguments are those of the fusion's. Same outputs to rounding; batch norms of :class:`Towers` are folded.
        """
        make = getattr(self.fusion, "for_serving", None)
        fusion = copy.deepcopy(self.fusion) if make is None else make(*args, **options)
        towers = copy.deepcopy(self.towers)
        if isinstance(towers, Towers) and towers.hidden is not None:
            towers.hidden = serving_bank(towers.hidden)
        return MultiTaskModel(fusion, towers).eval()
