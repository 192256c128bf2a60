"""The tables: under which keys a library keeps the numbers of each network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..adatt import AdaTT
from ..cross_stitch import CrossStitch
from ..esmm import ESMM
from ..mmoe import MMoE
from ..ple import PLE
from ..shared_bottom import SharedBottom


@dataclass(frozen=True)
class Layout:
    """One network in one library: templates of its state_dict keys.

    Fields of a template: ``l`` level, ``u`` unit (the tasks, then the shared one), ``e`` expert within the level, ``i``
    expert within its unit, ``k`` layer of an MLP, ``2k`` and so on what they say. A linear layer's or norm's template
    is the module's name, without ``.weight``.

    Attributes:
        network: ours.
        expert, shared_expert: the MLP of an expert; the shared unit's, where they lie elsewhere.
        linear, norm: layer k within an MLP, and its norm.
        norms: what may follow a linear layer: None, "batch", "layer".
        norm_bias: False: a linear layer below a batch norm has no bias.
        gate, gate_hidden, gate_norm: a gate's last layer, the MLP below it, the norm over its logits.
        shared_gate, shared_gate_hidden, shared_gate_norm: the same of the shared unit, where they lie elsewhere.
        gate_bias: whether gates have one.
        static: AdaTT's v: a matrix [T,m] for each level, or, without ``l``, [L,m] for each unit.
        shared_unit: True: there must be one, False: there must be none.
        tower, tower_last, tower_bias: the MLP of task u's tower, its last layer, and that one's bias if apart.
        names: of the tasks, in place of their numbers ``u``, in the keys of towers and of ESMM.
        prefix: of all keys but the towers', where the state holds towers.
        ignore: beginnings of keys that hold nothing of ours.
        unused: given the state, the experts per unit of every level, and T: adds the tensors that the library keeps
            and never uses.
    """

    network: type[nn.Module]
    expert: str
    linear: str
    tower: str
    tower_last: str
    tower_bias: str | None = None
    names: tuple[str, ...] = ()
    shared_expert: str | None = None
    norm: str | None = None
    norms: tuple[str | None, ...] = (None,)
    norm_bias: bool = True
    gate: str | None = None
    gate_hidden: str | None = None
    gate_norm: str | None = None
    shared_gate: str | None = None
    shared_gate_hidden: str | None = None
    shared_gate_norm: str | None = None
    gate_bias: bool = True
    static: str | None = None
    shared_unit: bool = False
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    unused: Callable[[dict[str, Tensor], Sequence[Sequence[int]], int], None] | None = None


def _no_shared_residual(state: dict[str, Tensor], units: Sequence[Sequence[int]], tasks: int) -> None:
    """AdaTTWSharedExps with one level keeps a v of no rows for its shared unit."""
    if len(units) == 1 and "self_exp_weights.0" in state:
        state[f"self_exp_weights.{tasks}"] = state["self_exp_weights.0"].new_zeros(0, units[0][tasks])


def _idle_shared(state: dict[str, Tensor], units: Sequence[Sequence[int]], tasks: int) -> None:
    """DeepCTR-Torch's PLE keeps as many shared experts as specific ones, and a shared gate at the last level too."""
    for level, counts in enumerate(units):
        own, shared = counts[0], counts[tasks]
        if any(n != own for n in counts[:tasks]) or shared > own:
            raise ValueError(
                "deepctr.ple takes equal task_experts, and no more shared_experts than those (its forward would fail); "
                f"got {counts[:tasks]} and {shared} at level {level}"
            )
        _zeros_like(
            state, f"specific_experts.{level}.0.0.", [f"shared_experts.{level}.0.{i}." for i in range(shared, own)]
        )
    last, total = len(units) - 1, own * tasks + shared
    _zeros_like(state, f"specific_gate_dnn.{last}.0.0.", [f"shared_gate_dnn.{last}."])
    gate = state[f"specific_gate_dnn_final_layer.{last}.0.weight"]
    state[f"shared_gate_dnn_final_layer.{last}.weight"] = gate.new_zeros(total, gate.shape[1])


def _zeros_like(state: dict[str, Tensor], source: str, targets: Sequence[str]) -> None:
    found = [(key.removeprefix(source), tensor) for key, tensor in state.items() if key.startswith(source)]
    state.update({target + rest: tensor.new_zeros(tensor.shape) for target in targets for rest, tensor in found})


_ADATT = Layout(
    network=AdaTT,
    expert="experts.{l}.{e}",
    linear="mlp_net.{2k}",
    gate="gate_weights.{l}.{u}.0",
    static="self_exp_weights.{l}",
    tower="task_modules.{u}.0",
    tower_last="task_modules.{u}.1",
    prefix="mtl_arch.",
)
_RECHUB = Layout(
    network=MMoE,
    expert="experts.{e}",
    linear="mlp.{4k}",
    norm="mlp.{4k+1}",
    norms=("batch",),
    gate="gates.{u}.mlp.0",
    gate_norm="gates.{u}.mlp.1",
    tower="towers.{u}",
    tower_last="towers.{u}.mlp.{4k}",
    ignore=("embedding.", "loss weight."),
)
_DEEPCTR = Layout(
    network=MMoE,
    expert="expert_dnn.{e}",
    linear="linears.{k}",
    norm="bn.{k}",
    norms=(None, "batch"),
    gate="gate_dnn_final_layer.{u}",
    gate_hidden="gate_dnn.{u}",
    gate_bias=False,
    tower="tower_dnn.{u}",
    tower_last="tower_dnn_final_layer.{u}",
    tower_bias="out.{u}.bias",
    ignore=("embedding_dict.", "linear_model."),
)
_EASYREC = Layout(
    network=MMoE,
    expert="expert_mlps.{e}",
    linear="mlp.{k}.perceptron.0",
    norm="mlp.{k}.perceptron.1",
    norms=(None, "batch", "layer"),
    norm_bias=False,
    gate="gate_finals.{u}",
    gate_hidden="gate_mlps.{u}",
    tower="_task_tower.{u}.tower_mlp",
    tower_last="_task_tower.{u}.linear",
    prefix="mmoe.",
    ignore=("embedding_group.",),
)
_BOTTOM = dict(network=SharedBottom, gate=None, gate_hidden=None, gate_norm=None, static=None)
_ESMM = dict(network=ESMM, gate=None, gate_hidden=None, gate_norm=None, names=("ctr", "cvr"))

LAYOUTS: dict[str, Layout] = {
    "adatt.att_sp": _ADATT,
    "adatt.att_g": replace(_ADATT, static="self_exp_weights.{u}", shared_unit=True, unused=_no_shared_residual),
    "adatt.ple": replace(_ADATT, network=PLE, static=None, shared_unit=True),
    "adatt.mmoe": replace(_ADATT, network=MMoE, static=None, gate="gates.{l}.{u}.1", gate_hidden="gates.{l}.{u}.0"),
    "adatt.cross_st": replace(_ADATT, network=CrossStitch, gate=None, static="stitchs.{l}.weight"),
    "adatt.share_bottom": replace(_ADATT, **_BOTTOM, expert="bottom_projection"),
    "rechub.mmoe": _RECHUB,
    "rechub.ple": replace(
        _RECHUB,
        network=PLE,
        expert="cgc_layers.{l}.experts_specific.{e}",
        shared_expert="cgc_layers.{l}.experts_shared.{i}",
        gate="cgc_layers.{l}.gates_specific.{u}.mlp.0",
        gate_norm="cgc_layers.{l}.gates_specific.{u}.mlp.1",
        shared_gate="cgc_layers.{l}.gate_shared.mlp.0",
        shared_gate_norm="cgc_layers.{l}.gate_shared.mlp.1",
        shared_unit=True,
    ),
    "rechub.shared_bottom": replace(_RECHUB, **_BOTTOM, expert="bottom_mlp"),
    "rechub.esmm": replace(_RECHUB, **_ESMM, tower="tower_{u}", tower_last="tower_{u}.mlp.{4k}"),
    "deepctr.mmoe": _DEEPCTR,
    "deepctr.ple": replace(
        _DEEPCTR,
        network=PLE,
        expert="specific_experts.{l}.{u}.{i}",
        shared_expert="shared_experts.{l}.0.{i}",
        gate="specific_gate_dnn_final_layer.{l}.{u}",
        gate_hidden="specific_gate_dnn.{l}.{u}.0",
        shared_gate="shared_gate_dnn_final_layer.{l}",
        shared_gate_hidden="shared_gate_dnn.{l}",
        shared_unit=True,
        unused=_idle_shared,
    ),
    "deepctr.shared_bottom": replace(_DEEPCTR, **_BOTTOM, expert="bottom_dnn"),
    "deepctr.esmm": replace(
        _DEEPCTR, **_ESMM, tower="{u}_dnn", tower_last="{u}_dnn_final_layer", tower_bias="out.bias"
    ),
    "easyrec.mmoe": _EASYREC,
    "easyrec.ple": replace(
        _EASYREC,
        network=PLE,
        expert="_extraction_nets.{l}._task_layers.{u}.{i}",
        shared_expert="_extraction_nets.{l}._shared_layers.{i}",
        gate="_extraction_nets.{l}._task_gates.{u}",
        shared_gate="_extraction_nets.{l}._shared_gate",
        gate_hidden=None,
        shared_unit=True,
        prefix="",
    ),
    "easyrec.extraction_net": replace(
        _EASYREC,
        network=PLE,
        expert="_task_layers.{u}.{i}",
        shared_expert="_shared_layers.{i}",
        gate="_task_gates.{u}",
        gate_hidden=None,
        shared_unit=True,
        prefix="",
    ),
}
