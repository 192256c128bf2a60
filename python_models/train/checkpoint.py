"""A run's files: a state that is written whole or not at all, the loss curve beside it, and who may write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from python_models.data import TaskData


class RunError(RuntimeError):
    """A run that cannot begin or go on; the message says why, and what to do."""


def write_atomic(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file such that whoever reads `path`, after a power cut too, finds the old one or the new one whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the name, too, must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save, whole or not at all."""
    write_atomic(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote, tensors and plain values alone. RunError for anything else."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        why = str(error).partition(". ")[0]
        raise RunError(f"{path}: not a checkpoint of this program; --overwrite begins anew. {why}") from error


class Curve:
    """The losses of every step: rows of float64 in a file that only grows, and is cut where a run goes on.

    A checkpoint at step n holds good for the first n rows; those behind it are of steps that will be done again, with
    the same result.
    """

    def __init__(self, path: Path, width: int, steps: int) -> None:
        self.path, self.width = path, width
        present = path.stat().st_size // (8 * width) if path.exists() else 0
        if present < steps:
            raise RunError(f"{path}: holds {present} steps, the checkpoint {steps}: the file was cut or replaced")
        with open(path, "ab"):
            pass
        os.truncate(path, 8 * width * steps)

    def append(self, rows: Tensor) -> None:
        """Add steps, float64 [n, width]. The system has them afterwards, and keeps them when the process ends."""
        with open(self.path, "ab") as file:
            file.write(rows.cpu().numpy().astype("<f8").tobytes())

    def sync(self) -> None:
        """They are on the disk afterwards: before a checkpoint counts on them."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def read(self, first: int = 0) -> Tensor:
        """Steps from `first` on, float64 [n, width]."""
        found = np.fromfile(self.path, "<f8", offset=8 * self.width * first)
        return torch.from_numpy(found.reshape(-1, self.width))


class Lock:
    """One process writes to a run's folder; the system takes the lock back when that process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.file = open(folder / ".lock", "w")  # noqa: SIM115
        try:
            import fcntl
        except ModuleNotFoundError:  # no such locks on Windows
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise RunError(f"{folder}: another process is at this run") from error

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def digest(data: TaskData) -> str:
    """A fingerprint of all rows: a run goes on with the data it began with."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in (data.numeric, data.categorical, data.labels, data.weights, data.domain, data.group):
        if tensor is not None:
            found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put them back."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
