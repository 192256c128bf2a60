"""Weights from other libraries' checkpoints, and back.

:data:`LAYOUTS` names the layouts: ``import_state(network, state_dict, "rechub.ple")`` reads one, and
``export_state(network, "rechub.ple")`` writes it. Experts in an ``nn.ModuleList`` of equal MLPs need no layout:
:meth:`mtlkernels.nn.ExpertMLP.from_modules` and ``to_modules`` go between them and a bank.
"""

from .layouts import LAYOUTS
from .transfer import export_state, import_state

__all__ = ["LAYOUTS", "export_state", "import_state"]
