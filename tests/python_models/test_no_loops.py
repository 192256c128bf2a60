"""No network loops over experts, tasks or domains in Python: twice as many of them are the same calls."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.papers import ARCHITECTURES, TINY

# Letters of `bench.papers.Sizes` that say how many of a kind there are; halves of four tasks and of eight are alike.
MANY = "TEmsJPSR"
FOUR = replace(TINY, T=4)


class Calls(TorchDispatchMode):
    """Counts what a step calls, by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **kwargs or {})


def calls(name, sizes, plain=False):
    """Of a training step, forward and backward; plain: of the network as people write it."""
    torch.manual_seed(0)
    about = ARCHITECTURES[name]
    network = about.make(sizes)
    if plain:
        network = about.rival(network)
    x, extras = torch.randn(sizes.B, sizes.K, requires_grad=True), about.extras(sizes)
    run = None if plain else about.run
    run = run or torch.nn.Module.__call__
    with Calls() as found:
        run(network, x, *extras).sum().backward()
    return found.found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_calls_the_same_for_more_experts_and_tasks(name):
    few = calls(name, FOUR)
    assert any(key.startswith("mtlkernels.") for key in few)
    # As deep as there are modules: the depths of soft ordering follow one another.
    for letter in MANY if name != "SoftOrdering" else MANY.replace("R", ""):
        more = calls(name, replace(FOUR, **{letter: 2 * getattr(FOUR, letter)}))
        assert more == few, f"{letter} doubled: {dict(more - few)} more, {dict(few - more)} fewer"


@pytest.mark.parametrize(("name", "letter"), [("MMoE", "E"), ("AdaTT", "T"), ("STAR", "P"), ("SNRTrans", "J")])
def test_a_loop_would_be_seen(name, letter):
    more = calls(name, replace(FOUR, **{letter: 2 * getattr(FOUR, letter)}), plain=True)
    assert more.total() > 1.3 * calls(name, FOUR, plain=True).total()
