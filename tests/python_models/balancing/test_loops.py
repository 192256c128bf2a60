"""A network of ours under each method in a plain loop, mixed precision, Lightning and accelerate."""

import copy

import pytest
import torch
from toy import gradients, same

from python_models import PLE, MultiTaskModel, Towers
from python_models.balancing import (
    MGDA,
    DynamicWeightAverage,
    GradNorm,
    PCGrad,
    UncertaintyWeighting,
    param_groups,
)
from python_models.losses import TaskLosses

KINDS = ("binary", "regression", "binary")
METHODS = {
    "DynamicWeightAverage": lambda: DynamicWeightAverage(3),
    "UncertaintyWeighting": lambda: UncertaintyWeighting(KINDS),
    "GradNorm": lambda: GradNorm(3),
    "GradNorm batched": lambda: GradNorm(3, batched=True),
    "PCGrad": lambda: PCGrad(3, weighting=UncertaintyWeighting(KINDS)),
    "MGDA": lambda: MGDA(3, normalisation="loss"),
}
every = pytest.mark.parametrize("name", METHODS)


def start(name, kinds=KINDS, dtype=torch.float32):
    torch.manual_seed(0)
    network = PLE(8, 3, 1, 1, [[8], [6]])
    model = MultiTaskModel(network, Towers(6, 3)).to(dtype)
    balancer = METHODS[name]()
    optimizer = torch.optim.Adam(param_groups(model, 0.02, {"bottom": 1.0}, also=[balancer]))
    return model, balancer, optimizer, TaskLosses(kinds)


def rows(count=256):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 8, generator=generator)
    y = torch.stack([(x[:, 0] > 0).float(), x[:, 1] + 0.5 * x[:, 0], (x[:, 2] + x[:, 0] > 0).float()], 1)
    mask = torch.rand(count, 3, generator=generator) < 0.8
    return x, torch.where(mask, y, torch.nan), mask


def trunk(model):
    """W of GradNorm: the experts of the last level."""
    return list(model.fusion.levels[-1].experts.parameters())


def learns(first, last):
    assert last < 0.7 * first, f"{first} -> {last}"


@every
def test_plain_loop(name):
    model, balancer, optimizer, losses = start(name)
    data, found = rows(), []
    for _ in range(6):
        for x, y, mask in zip(*(part.split(64) for part in data), strict=True):
            values = losses(model(x), y, mask)
            optimizer.zero_grad()
            balancer.backward(values, shared=trunk(model), active=losses.active(mask))
            optimizer.step()
            found.append(sum(value.item() for value in values))
        balancer.end_epoch()
    learns(sum(found[:4]), sum(found[-4:]))


@every
def test_batched_gradients_and_losses_of_one_pass(name):
    """All tasks binary: one operator gives all losses, and its gradients batch."""
    first, second = start(name, ["binary"] * 3), start(name, ["binary"] * 3)
    x, y, mask = rows()
    y = (y > 0).float()
    for model, balancer, _, losses in (first, second):
        outputs = model(x) if model is first[0] else list(model(x).unbind(1))
        balancer.backward(losses(outputs, y, mask), shared=trunk(model))
    same(gradients(first[0]) | dict(first[1].state_dict()), gradients(second[0]) | dict(second[1].state_dict()), 1e-6)


@every
def test_mixed_precision(name):
    """bfloat16 under autocast with a scaler, and a step that is not finite."""
    model, balancer, optimizer, losses = start(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    x, y, mask = rows()
    found = []
    for step in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            values = losses(model(x if step != 5 else x * torch.inf), y, mask)
        optimizer.zero_grad()
        kept = copy.deepcopy((dict(model.state_dict()), dict(balancer.state_dict())))
        balancer.backward(values, shared=trunk(model), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        if step == 5:  # not finite: nobody learns
            same(dict(model.state_dict()), kept[0])
            same(dict(balancer.state_dict()), kept[1])
        else:
            found.append(sum(value.item() for value in values))
    learns(found[0], found[-1])


@every
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.model, self.balancer, _, self.losses = start(name)
            self.found = []

        def training_step(self, batch, index):
            x, y, mask = batch
            values = self.losses(self.model(x), y, mask)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.balancer.backward(values, shared=trunk(self.model), backward=self.manual_backward)
            optimizer.step()
            self.found.append(sum(value.item() for value in values))

        def on_train_epoch_end(self):
            self.balancer.end_epoch()

        def configure_optimizers(self):
            return torch.optim.Adam(param_groups(self.model, 0.02, {"bottom": 1.0}, also=[self.balancer]))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), 64)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=6, default_root_dir=tmp_path, **silent)
    module = Module()
    trainer.fit(module, loader)
    learns(sum(module.found[:4]), sum(module.found[-4:]))
    # The balancer is a part of the checkpoint.
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    same({key: state[f"balancer.{key}"] for key in module.balancer.state_dict()}, dict(module.balancer.state_dict()))
    plain = run_plainly(name)
    same(dict(module.model.state_dict()), dict(plain.state_dict()))


def run_plainly(name, epochs=6):
    model, balancer, optimizer, losses = start(name)
    for _ in range(epochs):
        for x, y, mask in zip(*(part.split(64) for part in rows()), strict=True):
            optimizer.zero_grad()
            balancer.backward(losses(model(x), y, mask), shared=trunk(model))
            optimizer.step()
        balancer.end_epoch()
    return model


@every
def test_accelerate(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, balancer, optimizer, losses = start(name)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), 64)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(balancer)
    found = []

    def epoch():
        for x, y, mask in loader:
            values = losses(model(x), y, mask)
            optimizer.zero_grad()
            balancer.backward(values, shared=trunk(model), backward=accelerator.backward)
            optimizer.step()
            found.append(sum(value.item() for value in values))
        balancer.end_epoch()

    for _ in range(6):
        epoch()
    learns(sum(found[:4]), sum(found[-4:]))
    same(dict(model.state_dict()), dict(run_plainly(name).state_dict()))
    accelerator.save_state(str(tmp_path / "state"))
    kept = copy.deepcopy(dict(balancer.state_dict()))
    epoch()
    after = copy.deepcopy(dict(balancer.state_dict()))
    accelerator.load_state(str(tmp_path / "state"))
    same(dict(balancer.state_dict()), kept)
    epoch()
    same(dict(balancer.state_dict()), after)
