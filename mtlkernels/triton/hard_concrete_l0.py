"""The L0 penalty lies beside hard_concrete; an operator's launchers are looked up by the operator's name."""

from .hard_concrete import hard_concrete_l0, hard_concrete_l0_backward

__all__ = ["hard_concrete_l0", "hard_concrete_l0_backward"]
