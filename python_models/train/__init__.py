"""Training: a short loop over rows in memory, and the command ``python -m python_models.train CONFIG.toml``.

:func:`fit`, :func:`predict` and :func:`evaluate` are for scripts of one's own. The command adds a configuration file,
checkpoints with exact resume, early stopping, logs and a report; ``python -m python_models.train --example`` prints a
configuration with every key.
"""

from .simple import binary_loss, evaluate, fit, predict, squared_loss

__all__ = ["binary_loss", "evaluate", "fit", "predict", "squared_loss"]
