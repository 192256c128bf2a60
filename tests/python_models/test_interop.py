"""Other libraries' weights in, and out again: the same outputs, the same numbers, and errors that name the key."""

import peers
import pytest
import torch
from torch import nn

from bench import adatt_repo
from mtlkernels.nn import ExpertMLP, Towers
from python_models import ESMM, PLE, AdaTT, CrossStitch, MMoE, MultiTaskModel, SharedBottom
from python_models.interop import LAYOUTS, export_state, import_state


def towers(tasks, dims, width=4, **options):
    return Towers(width, tasks, dims, **options)


def extraction_net():
    net = peers.ExtractionNet(6, [5, 4], 2, 1, 3, True)
    net.forward = lambda x, run=net.forward: torch.stack(run([x] * 4), 1)
    return net


# layout, theirs, ours
DIMS = [[5], [7, 4]]
CASES = {
    "att_sp": ("adatt.att_sp", lambda: adatt_repo.Fusion("att_sp", 6, DIMS, [2, 2]), lambda: AdaTT(6, 2, 2, 0, DIMS)),
    "att_sp single": (
        "adatt.att_sp",
        lambda: adatt_repo.Fusion("att_sp", 6, DIMS, [1] * 3),
        lambda: AdaTT(6, 3, 1, 0, DIMS),
    ),
    "att_sp, towers": (
        "adatt.att_sp",
        lambda: adatt_repo.CentralTaskArch(adatt_repo.Fusion("att_sp", 6, DIMS, [2, 2]), 4, 2, [3]),
        lambda: MultiTaskModel(AdaTT(6, 2, 2, 0, DIMS), towers(2, [3])),
    ),
    "att_g": (
        "adatt.att_g",
        lambda: adatt_repo.Fusion("att_g", 6, DIMS, [1, 3], 2),
        lambda: AdaTT(6, 2, [1, 3], 2, DIMS),
    ),
    "att_g single": (
        "adatt.att_g",
        lambda: adatt_repo.Fusion("att_g", 6, DIMS, [1, 1], 1),
        lambda: AdaTT(6, 2, 1, 1, DIMS),
    ),
    "att_g, one level": (
        "adatt.att_g",
        lambda: adatt_repo.CentralTaskArch(adatt_repo.Fusion("att_g", 6, [[4]], [2, 2], 1), 4, 2, []),
        lambda: MultiTaskModel(AdaTT(6, 2, 2, 1, [[4]]), towers(2, [])),
    ),
    "ple": ("adatt.ple", lambda: adatt_repo.Fusion("ple", 6, DIMS, [1, 3], 2), lambda: PLE(6, 2, [1, 3], 2, DIMS)),
    "ple, equal": ("adatt.ple", lambda: adatt_repo.Fusion("ple", 6, [[4]], [2, 2], 2), lambda: PLE(6, 2, 2, 2, [[4]])),
    "ml-mmoe": ("adatt.mmoe", lambda: adatt_repo.MLMMoE(6, DIMS, [], 2, 3), lambda: MMoE(6, 2, 3, DIMS)),
    "ml-mmoe, deep gates": (
        "adatt.mmoe",
        lambda: adatt_repo.MLMMoE(6, DIMS, [3, 5], 2, 3),
        lambda: MMoE(6, 2, 3, DIMS, [3, 5]),
    ),
    "cross_st": (
        "adatt.cross_st",
        lambda: adatt_repo.CentralTaskArch(adatt_repo.CrossStitch(6, DIMS, 3), 4, 3, [3]),
        lambda: MultiTaskModel(CrossStitch(6, 3, DIMS), towers(3, [3])),
    ),
    "share_bottom": (
        "adatt.share_bottom",
        lambda: adatt_repo.CentralTaskArch(adatt_repo.SharedBottom(6, [5, 4], 3), 4, 3, [3, 2]),
        lambda: MultiTaskModel(SharedBottom(6, 3, [5, 4]), towers(3, [3, 2])),
    ),
    "easyrec.mmoe": (
        "easyrec.mmoe",
        lambda: peers.EasyMMoE(6, [5, 4], 3, 2, [5], "batch"),
        lambda: MMoE(6, 2, 3, [[5, 4]], [5], norm="batch"),
    ),
    "easyrec.mmoe, layer norm": (
        "easyrec.mmoe",
        lambda: peers.EasyMMoE(6, [5, 4], 3, 2, norm="layer"),
        lambda: MMoE(6, 2, 3, [[5, 4]], norm="layer"),
    ),
    "easyrec.extraction_net": ("easyrec.extraction_net", extraction_net, lambda: PLE(6, 3, 2, 1, [[5, 4]])),
    "easyrec.ple": (
        "easyrec.ple",
        lambda: peers.EasyPLE(6, DIMS, [2, 1], [1, 2], 3, [3]),
        lambda: MultiTaskModel(PLE(6, 3, [[2] * 3, [1] * 3], [1, 2], DIMS), towers(3, [3])),
    ),
}
every_case = pytest.mark.parametrize(("layout", "theirs", "ours"), CASES.values(), ids=CASES.keys())


def random_norms(model):
    """Statistics and affine parts that are not their defaults, for a norm that is left out would not show."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)) or type(module).__name__ == "ExpertBatchNorm":
            with torch.no_grad():
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    if tensor.is_floating_point():
                        tensor.uniform_(0.5, 1.5) if "var" in name or name == "weight" else tensor.normal_(0, 0.3)
    return model


def pair(theirs, ours, seed=0):
    torch.manual_seed(seed)
    return random_norms(theirs()), random_norms(ours())


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_case
def test_imports(layout, theirs, ours):
    them, us = pair(theirs, ours)
    x = torch.randn(9, 6)
    assert not torch.allclose(us.eval()(x), them.eval()(x), atol=1e-3)
    import_state(us, them.state_dict(), layout)
    close(us(x), them(x))
    close(us.train()(x), them.train()(x))  # batch statistics, where there are norms


@every_case
def test_exports_what_they_load(layout, theirs, ours):
    them, us = pair(theirs, ours)
    x = torch.randn(9, 6)
    them.load_state_dict(export_state(us, layout))  # every key, every shape
    close(them.eval()(x), us.eval()(x))


@every_case
def test_there_and_back_changes_no_number(layout, theirs, ours):
    them, us = pair(theirs, ours)
    before = {key: tensor.clone() for key, tensor in them.state_dict().items()}
    import_state(us, before, layout)
    after = export_state(us, layout)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    after[next(iter(after))].fill_(7)  # copies, both ways
    assert all(torch.equal(tensor, before[key]) for key, tensor in export_state(us, layout).items())


def rechub(make, params, dims=(5, 4)):
    """A torch-rechub network over one dense feature of 6 columns and one embedding, as a function of x [B,6]."""
    multi_task = pytest.importorskip("torch_rechub.models.multi_task", reason="torch-rechub is not installed")
    from torch_rechub.basic.features import DenseFeature, SparseFeature

    features = [SparseFeature("id", vocab_size=3, embed_dim=2), *(DenseFeature(f"x{c}") for c in range(4))]
    params["tower_params_list"] = [{"dims": [3]}] * 2
    model = getattr(multi_task, make)(features, ["regression"] * 2, **params)
    columns = {"id": torch.zeros(9, dtype=torch.long)}

    def run(x):
        return model(columns | {f"x{c}": x[:, c] for c in range(4)})

    def inputs(x):
        embedded = model.embedding(columns | {f"x{c}": x[:, c] for c in range(4)}, features, squeeze_dim=True)
        return embedded.detach()

    return model, run, inputs


def deepctr(make, use_bn=False, **params):
    """A DeepCTR-Torch network over 4 dense columns and one embedding."""
    module = pytest.importorskip("deepctr_torch.models", reason="deepctr-torch is not installed")
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    columns = [SparseFeat("id", vocabulary_size=3, embedding_dim=2), DenseFeat("x", 4)]
    model = getattr(module, make)(
        columns,
        tower_dnn_hidden_units=(3,),
        task_types=("regression",) * 2,
        task_names=("a", "b"),
        init_std=0.5,
        dnn_use_bn=use_bn,
        **params,
    )

    def full(x):
        return torch.cat([torch.zeros(len(x), 1), x], 1)

    def inputs(x):
        from deepctr_torch.inputs import combined_dnn_input

        parts = model.input_from_feature_columns(full(x), model.dnn_feature_columns, model.embedding_dict)
        return combined_dnn_input(*parts).detach()

    return model, lambda x: model(full(x)), inputs


EXPERT = {"dims": [5, 4], "activation": "relu"}
RECHUB_NORMS = dict(norm="batch", gate_logit_norm=True)
LEVELS = [[5, 4], [5, 4]]
PACKAGES = {
    "rechub.mmoe": (
        lambda: rechub("MMOE", {"n_expert": 3, "expert_params": EXPERT}),
        lambda **k: MMoE(6, 2, 3, [[5, 4]], **k),
        RECHUB_NORMS,
    ),
    "rechub.ple": (
        lambda: rechub("PLE", {"n_level": 2, "n_expert_specific": 2, "n_expert_shared": 1, "expert_params": EXPERT}),
        lambda **k: PLE(6, 2, 2, 1, LEVELS, **k),
        RECHUB_NORMS,
    ),
    "rechub.shared_bottom": (
        lambda: rechub("SharedBottom", {"bottom_params": EXPERT}),
        lambda **k: SharedBottom(6, 2, [5, 4], **{"norm": k.get("norm")}),
        RECHUB_NORMS,
    ),
    "deepctr.mmoe": (
        lambda: deepctr("MMOE", num_experts=3, expert_dnn_hidden_units=(5, 4), gate_dnn_hidden_units=(7,)),
        lambda **k: MMoE(6, 2, 3, [[5, 4]], [7], gate_bias=False, **k),
        {},
    ),
    "deepctr.mmoe, norms": (
        lambda: deepctr("MMOE", True, num_experts=3, expert_dnn_hidden_units=(5, 4), gate_dnn_hidden_units=(7,)),
        lambda **k: MMoE(6, 2, 3, [[5, 4]], [7], gate_bias=False, **k),
        dict(norm="batch", gate_norm="batch"),
    ),
    "deepctr.ple": (
        lambda: deepctr("PLE", specific_expert_num=3, expert_dnn_hidden_units=(5, 4), gate_dnn_hidden_units=(7,)),
        lambda **k: PLE(6, 2, 3, 1, LEVELS, [7], gate_bias=False, **k),
        {},
    ),
    "deepctr.ple, linear gates": (
        lambda: deepctr(
            "PLE",
            specific_expert_num=2,
            shared_expert_num=2,
            num_levels=1,
            gate_dnn_hidden_units=(),
            expert_dnn_hidden_units=(5, 4),
        ),
        lambda **k: PLE(6, 2, 2, 2, [[5, 4]], gate_bias=False, **k),
        {},
    ),
    "deepctr.shared_bottom": (
        lambda: deepctr("SharedBottom", bottom_dnn_hidden_units=(5, 4)),
        lambda **k: SharedBottom(6, 2, [5, 4], **k),
        {},
    ),
}
every_package = pytest.mark.parametrize("name", PACKAGES)


def package(name, **norms):
    torch.manual_seed(0)
    theirs, ours, options = PACKAGES[name]
    model, run, inputs = theirs()
    options = norms or options
    us = MultiTaskModel(ours(**options), Towers(4, 2, [3], norm=options.get("norm")))
    return name.split(",")[0], random_norms(model), run, inputs, random_norms(us)


@every_package
def test_package(name):
    layout, model, run, inputs, us = package(name)
    x = torch.randn(9, 4)
    left = import_state(us, model.state_dict(), layout)
    assert any("embed" in key for key in left)
    for module in (model, us):
        module.eval()
    close(us(inputs(x)), run(x))
    for module in (model, us):
        module.train()
    close(us(inputs(x)), run(x))
    # Out again, into a network of other numbers.
    _, other, run, inputs, _ = package(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    missing, unexpected = other.load_state_dict(export_state(us, layout), strict=False)
    assert not unexpected and all("embed" in key for key in missing)
    close(us.eval()(inputs(x)), (other.eval(), run(x))[1])


@pytest.mark.parametrize("name", [name for name in PACKAGES if "rechub" in name or "norms" in name])
def test_folds_norms(name):
    layout, model, run, inputs, us = package(name, norm=None)
    x = torch.randn(9, 4)
    with pytest.raises(ValueError, match="running_mean|num_batches|has the key .* norm"):
        import_state(us, model.state_dict(), layout)
    import_state(us, model.state_dict(), layout, fold_norms=True)
    model.eval(), us.eval()
    close(us(inputs(x)), run(x))
    model.load_state_dict(export_state(us, layout, fold_norms=True), strict=False)
    close(us(inputs(x)), run(x))
    if "rechub" in name:
        with pytest.raises(ValueError, match=r"has a norm at '.*', the model none"):
            export_state(us, layout)


def rechub_esmm():
    """Theirs over two embeddings, a run of it as probabilities of ours, and what its towers read."""
    module = pytest.importorskip("torch_rechub.models.multi_task", reason="torch-rechub is not installed")
    from torch_rechub.basic.features import SparseFeature

    features = [SparseFeature(name, vocab_size=9, embed_dim=3) for name in ("user", "item")]
    model = module.ESMM(features[:1], features[1:], {"dims": [5, 4]}, {"dims": [5, 4]})

    def run(rows):
        cvr, ctr, both = model({"user": rows[:, 0], "item": rows[:, 1]}).unbind(1)
        return {"pCTR": ctr, "pCVR": cvr, "pCTCVR": both}

    def inputs(rows):
        columns = {"user": rows[:, 0], "item": rows[:, 1]}
        return model.embedding(columns, features, squeeze_dim=True).detach()

    return model, run, inputs


def deepctr_esmm(use_bn=False):
    module = pytest.importorskip("deepctr_torch.models", reason="deepctr-torch is not installed")
    from deepctr_torch.inputs import SparseFeat, combined_dnn_input

    columns = [SparseFeat(name, vocabulary_size=9, embedding_dim=3) for name in ("user", "item")]
    model = module.ESMM(columns, tower_dnn_hidden_units=(5, 4), init_std=0.5, dnn_use_bn=use_bn)
    torch.nn.init.constant_(model.out.bias, 0.3)

    def run(rows):
        return dict(zip(("pCTR", "pCTCVR"), model(rows.float()).unbind(1), strict=True))

    def inputs(rows):
        parts = model.input_from_feature_columns(rows.float(), model.dnn_feature_columns, model.embedding_dict)
        return combined_dnn_input(*parts).detach()

    return model, run, inputs


ESMMS = {
    "rechub.esmm": (rechub_esmm, "batch"),
    "rechub.esmm, folded": (rechub_esmm, None),
    "deepctr.esmm": (deepctr_esmm, None),
    "deepctr.esmm, norms": (lambda: deepctr_esmm(True), "batch"),
}


@pytest.mark.parametrize("name", ESMMS)
def test_esmm(name):
    torch.manual_seed(0)
    make, norm = ESMMS[name]
    layout, fold = name.split(",")[0], "folded" in name
    model, run, inputs = make()
    random_norms(model), model.eval()
    us, rows = random_norms(ESMM(6, (5, 4), norm=norm)), torch.randint(9, (11, 2))
    left = import_state(us, model.state_dict(), layout, fold_norms=fold)
    assert left and all("embed" in key for key in left)
    ours = {key: logit.sigmoid() for key, logit in us.eval()(inputs(rows)).items()}
    for key, wanted in run(rows).items():
        close(ours[key], wanted)
    state = model.state_dict()
    other, run, inputs = make()
    missing, unexpected = other.load_state_dict(export_state(us, layout, fold_norms=fold), strict=False)
    assert not unexpected and all("embed" in key for key in missing)
    other.eval()
    ours = {key: logit.sigmoid() for key, logit in us(inputs(rows)).items()}
    for key, wanted in run(rows).items():
        close(ours[key], wanted)
    for key in export_state(us, layout, fold_norms=fold).keys() & state.keys():
        # Of a norm that is folded its other keys are named when its mean is not there.
        words = f"no key '{key}'" if not (fold and key.endswith("running_mean")) else "state has the key"
        with pytest.raises(ValueError, match=words):
            import_state(us, {k: v for k, v in state.items() if k != key}, layout, fold_norms=fold)
    with pytest.raises(ValueError, match="the key '.*9.*', which the model has no place for"):
        key = next(key for key in state if "dnn.linears.1" in key or "tower_ctr.mlp.4" in key)
        import_state(us, state | {key.replace(".1.", ".9.").replace(".4.", ".9."): state[key]}, layout, fold_norms=fold)


def test_one_bias_for_two_towers():
    """DeepCTR-Torch adds one bias to both logits."""
    us = ESMM(6, (5, 4))
    with pytest.raises(ValueError, match="one tensor 'out.bias' where the model has several, which differ"):
        export_state(us, "deepctr.esmm")
    torch.nn.init.constant_(us.last.bias, 0.3)
    state = export_state(us, "deepctr.esmm")
    torch.nn.init.normal_(us.last.bias)
    import_state(us, state, "deepctr.esmm")
    assert us.last.bias.eq(0.3).all()


def test_folds_norms_over_layers_without_bias():
    def theirs():
        return peers.EasyMMoE(6, [5, 4], 3, 2, norm="batch")

    them, us = pair(theirs, lambda: MMoE(6, 2, 3, [[5, 4]]))
    x = torch.randn(9, 6)
    import_state(us, them.state_dict(), "easyrec.mmoe", fold_norms=True)
    close(us(x), them.eval()(x))
    other = pair(theirs, theirs, 1)[0]
    other.load_state_dict(export_state(us, "easyrec.mmoe", fold_norms=True))
    close(other.eval()(x), us(x))


def test_prefix_and_towers_left():
    theirs = CASES["att_sp, towers"][1]()
    state = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()} | {"step": torch.ones(())}
    us = AdaTT(6, 2, 2, 0, DIMS)
    left = import_state(us, state, "adatt.att_sp", prefix="module.mtl_arch.")
    assert len(left) == 9 and "step" in left and all("task_modules" in key for key in left if key != "step")
    x = torch.randn(9, 6)
    close(us(x), theirs.mtl_arch(x))
    assert export_state(us, "adatt.att_sp", prefix="module.mtl_arch.").keys() == state.keys() - set(left)
    bare = theirs.mtl_arch.state_dict()
    assert import_state(us, bare | {"task_modules.0.1.bias": torch.ones(1)}, "adatt.att_sp") == [
        "task_modules.0.1.bias"
    ]


def test_experts_alone_need_no_layout():
    experts = adatt_repo.Fusion("att_sp", 6, [[5, 4]], [2, 2]).experts[0]
    x = torch.randn(9, 6)
    close(ExpertMLP.from_modules(experts)(x), torch.stack([expert(x) for expert in experts], 1))


def test_experts_of_torch_rechub_need_no_layout():
    theirs, *_ = rechub("MMOE", {"n_expert": 3, "expert_params": EXPERT})
    x = torch.randn(9, 6)
    bank = ExpertMLP.from_modules(random_norms(theirs).experts)
    close(bank(x), torch.stack([expert(x) for expert in theirs.experts], 1))


def damaged(change):
    state = dict(adatt_repo.Fusion("ple", 6, DIMS, [1, 2], 1).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("experts.1.3.mlp_net.2.bias"),
            r"no key 'experts.1.3.mlp_net.2.bias', expected of shape \(4,\)",
        ),
        (lambda s: s.update({"experts.0.4.mlp_net.0.bias": torch.ones(5)}), "the key 'experts.0.4.mlp_net.0.bias'"),
        (
            lambda s: s.update({"gate_weights.0.1.0.weight": torch.ones(4, 6)}),
            r"'gate_weights.0.1.0.weight' has shape \(4, 6\); the model needs \(3, 6\)",
        ),
    ],
)
def test_a_state_that_does_not_fit(change, words):
    us = PLE(6, 2, [1, 2], 1, DIMS)
    before = {key: tensor.clone() for key, tensor in us.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        import_state(us, damaged(change), "adatt.ple")
    assert all(torch.equal(tensor, before[key]) for key, tensor in us.state_dict().items())  # nothing was copied


@pytest.mark.parametrize(
    ("model", "layout", "error", "words"),
    [
        (lambda: AdaTT(6, 2, 1), "adatt", ValueError, "layout must be one of adatt.att_sp, .* got 'adatt'"),
        (lambda: MMoE(6, 2, 2, DIMS), "adatt.att_sp", TypeError, "this layout is for AdaTT; got MMoE"),
        (lambda: MMoE(6, 2, 2, DIMS), "rechub.mmoe", ValueError, "this layout has one level; expert_dims has 2"),
        (lambda: MMoE(6, 2, 2, [[4]], omoe=True), "easyrec.mmoe", ValueError, "omoe: this layout has a gate for every"),
        (lambda: MMoE(6, 2, 2, [[4]]), "deepctr.mmoe", ValueError, "needs a network with gate_bias=False"),
        (
            lambda: MMoE(6, 2, 2, [[4]], norm="batch"),
            "adatt.mmoe",
            ValueError,
            "no batch norm at 'experts.0.0.mlp_net.0'",
        ),
        (lambda: MMoE(6, 2, 2, [[4]], gate=nn.Linear), "adatt.mmoe", TypeError, "modules of its own"),
        (
            lambda: MMoE(6, 2, 2, [[4]], expert=lambda k, dims: nn.Linear(k, *dims)),
            "adatt.mmoe",
            TypeError,
            "network has modules of its own",
        ),
        (
            lambda: MultiTaskModel(MMoE(6, 2, 2, [[4]]), Towers(4, 2, tower=nn.Linear)),
            "adatt.mmoe",
            TypeError,
            "the towers are modules of their own",
        ),
        (lambda: PLE(6, 2, 1, 1, [[4]], [3]), "adatt.ple", ValueError, "linear gates; the network has gate_dims"),
        (lambda: PLE(6, 2, 1, 0, [[4]]), "adatt.ple", ValueError, "shared_experts must be there"),
        (lambda: AdaTT(6, 2, 2, 1), "adatt.att_sp", ValueError, "shared_experts must not be there"),
        (lambda: AdaTT(6, 2, [1, 2]), "adatt.att_sp", ValueError, r"takes equal task_experts; got \[1, 2\] at level 0"),
        (lambda: AdaTT(6, 2, [[1, 2], [2, 2]], 1), "adatt.att_g", ValueError, "unit 0 has unequal counts"),
        (
            lambda: AdaTT(6, 2, [1, 2], 1, single_expert="per_unit"),
            "adatt.att_g",
            ValueError,
            "single_expert='per_unit' has no place",
        ),
        (
            lambda: PLE(6, 2, 1, 2, [[4]], gate_bias=False),
            "deepctr.ple",
            ValueError,
            r"no more shared_experts than those .* got \[1, 1\] and 2",
        ),
    ],
)
def test_models_without_a_place(model, layout, error, words):
    with pytest.raises(error, match=words):
        export_state(model(), layout)
    with pytest.raises(error, match=words):
        import_state(model(), {}, layout)


def test_what_is_no_state_and_has_no_memory():
    with pytest.raises(TypeError, match="state must be a state_dict; got list"):
        import_state(MMoE(6, 2, 2, [[4]]), [], "adatt.mmoe")
    with torch.device("meta"):
        model = MMoE(6, 2, 2, [[4]])
    with pytest.raises(ValueError, match="model is on the meta device .* call to_empty first"):
        import_state(model, {}, "adatt.mmoe")


def test_every_layout_is_tested():
    assert {layout for layout, _, _ in CASES.values()} | {name.split(",")[0] for name in PACKAGES | ESMMS} == set(
        LAYOUTS
    )
