"""Checkpoints of a model and its optimizer, written by all ranks together and read by any number of them.

``torch.distributed.checkpoint`` stores every tensor under its name and its place in the whole, so what four ranks with
sharded experts wrote, two ranks under another plan, or one process, can read.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def save(folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes ``folder/step_<step>``; every rank calls it. The file that makes it complete is written last."""
    parameters, state = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": state, "step": torch.tensor(step)}, checkpoint_id=_at(folder, step))


def resume(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the last complete checkpoint into both, in place, and returns its step; 0 where there is none.

    An incomplete one, as a rank leaves that died while it was being written, is passed over.

    Raises:
        torch.distributed.checkpoint.api.CheckpointException: a tensor of the model is not in it, or has another shape.
    """
    step = last_step(folder)
    if step:
        parameters, state = get_state_dict(model, optimizer)
        dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=_at(folder, step))
        set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)
    return step


def last_step(folder: str | Path) -> int:
    """The step of the last complete checkpoint in a folder, 0 where there is none."""
    found = [int(p.parent.name.removeprefix("step_")) for p in Path(folder).glob("step_*/.metadata")]
    return max(found, default=0)


def _at(folder: str | Path, step: int) -> str:
    return str(Path(folder) / f"step_{step:08d}")
