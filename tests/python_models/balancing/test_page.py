"""docs/balancing.md, as it stands."""

import re
from pathlib import Path

import pytest
import torch

from python_models import balancing, losses

PAGE = (Path(__file__).parents[3] / "docs/balancing.md").read_text()


def test_its_code_runs(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    plain, by_lightning, by_accelerate = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    space = {}
    exec(plain, space)
    before = space["balancer"].weights.clone()
    assert (before != 1).any()
    exec(by_lightning, space)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(space["Training"](space["model"], space["losses"], space["balancer"]), space["loader"])
    middle = space["balancer"].weights.clone()
    exec(by_accelerate, space)
    assert (before != middle).any() and (middle != space["balancer"].weights).any()


def test_its_tables_name_what_there_is():
    public = set(balancing.__all__) - {"Balancer"}
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert public | set(losses.KINDS) <= named
    assert all(hasattr(balancing, name) for name in named - set(losses.KINDS))
