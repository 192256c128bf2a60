"""The numbers behind the pictures, and what stands in them."""

import io

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from python_models import CGC, PLE, AdaTT, MMoE, MultiTaskModel, SharedBottom, Towers, viz

NAMES = ["income", "married", "education"]


def texts(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    assert buffer.getvalue().startswith(b"\x89PNG")
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return found + [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]


def test_expert_weights_are_means_of_the_gates():
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    for network in (MMoE(6, 3, [4, 2], [[5], [4]]), PLE(6, 3, [1, 0, 2], 1, [[5], [4]]), CGC(6, 3, 1, 1, [4])):
        model = MultiTaskModel(network, Towers(4, 3)).train()
        levels = viz.expert_weights(model, x)
        assert model.training
        for level, weights in zip(levels, network(x, return_gates=True)[1], strict=True):
            torch.testing.assert_close(level.weights, weights.mean(0))
            assert sum(level.experts_per_unit) == weights.shape[2]
    assert [level.num_tasks for level in viz.expert_weights(MMoE(6, 3, [4, 2], [[5], [4]]), x)] == [0, 3]


def test_expert_weights_of_adatt_hold_its_residual():
    network, x = AdaTT(6, 2, [1, 2], 1, [[5], [4]]), torch.randn(9, 6)
    both, gates = viz.expert_weights(network, x), viz.expert_weights(network, x, residual=False)
    for level, a, b in zip(network.levels, both, gates, strict=True):
        torch.testing.assert_close(a.weights - b.weights, level.residual_weights().detach())
        torch.testing.assert_close(b.weights.sum(1), torch.ones(level.rows))


def test_dropout_is_off():
    network, x = MMoE(6, 2, 3, [[4]], [8], gate_dropout=0.5), torch.randn(9, 6)
    a, b = (viz.expert_weights(network, x)[0].weights for _ in range(2))
    assert torch.equal(a, b)


def test_gate_entropy():
    even, one = torch.full((4, 1, 3), 1 / 3), torch.tensor([0.0, 1.0, 0.0]).expand(4, 1, 3)
    half = torch.tensor([0.5, 0.0, 0.5]).expand(4, 1, 3)  # two experts read, both alike
    mixed = torch.cat((even[:2], one[:2]))  # over the batch three experts are read
    found = viz.gate_entropy([torch.cat((even, one, half, mixed), 1), one])
    torch.testing.assert_close(found[0], torch.tensor([1.0, 0.0, 1.0, 0.5]))
    torch.testing.assert_close(found[1], torch.zeros(1))


def test_draws_expert_weights():
    torch.manual_seed(0)
    weights = [torch.tensor([[0.7, 0.1, -0.2, 0.4], [0.0, 0.25, 0.35, 0.4], [0.1, 0.1, 0.1, 0.7]])]
    found = texts(viz.draw_expert_weights([viz.ExpertWeights(weights[0], [1, 2, 1], 2)], NAMES[:2]))
    assert found.count("0.40") == 2 and "-0.20" in found and "0.00" not in found  # nothing where nothing is read
    assert all(found.count(name) == 2 for name in (*NAMES[:2], "shared"))  # a row and a group of columns each
    levels = viz.expert_weights(MMoE(6, 2, [3, 2], [[5], [4]]), torch.randn(9, 6))
    found = texts(viz.draw_expert_weights(levels))
    assert {"to expert 1", "to expert 2", "task 1", "task 2", "experts"} <= set(found)
    for network in (AdaTT(6, 1, 1, 0, [[4]]), PLE(6, 3, [1, 0, 2], 1, [[5], [4]]), PLE(6, 2, 1, 0, [[4]])):
        texts(viz.draw_expert_weights(viz.expert_weights(network, torch.randn(9, 6))))


def test_draws_gate_entropy():
    history = [viz.gate_entropy(AdaTT(6, 3, 1, 1, [[5], [4]])(torch.randn(9, 6), return_gates=True)[1]) for _ in "abc"]
    figure = viz.draw_gate_entropy(history, [10, 20, 30], NAMES)
    upper, lower = figure.axes
    # A line a row, and its piece to the name; the shared unit has no gate at the last level.
    assert [len(axes.lines) for axes in (upper, lower)] == [2 * 4, 2 * 3]
    assert torch.tensor(upper.lines[1].get_ydata()).allclose(torch.stack([h[0][1] for h in history]).double())
    assert len({str(line.get_linestyle()) + str(line.get_color()) for line in upper.lines}) == 4
    assert {"income", "shared"} <= set(texts(figure))
    for axes in (upper, lower):
        curves = {style(line): line.get_ydata()[-1] for line in axes.lines[: len(axes.lines) // 2]}
        for piece, name in zip(axes.lines[len(curves) :], axes.texts, strict=True):
            assert piece.get_ydata()[0] == curves[style(piece)] and piece.get_ydata()[1] == name.get_position()[1]


def style(line):
    return str(line.get_linestyle()), line.get_color()


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_rows_of_a_lower_mmoe_level_are_experts(experts):
    gates = MMoE(6, 2, experts, [[5], [4]])(torch.randn(9, 6), return_gates=True)[1]
    figure = viz.draw_gate_entropy([viz.gate_entropy(gates)], None, NAMES[:2], to_experts=True)
    upper, lower = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert sorted(upper) == [f"to expert {e + 1}" for e in range(experts)] and sorted(lower) == sorted(NAMES[:2])
    assert all(line.get_marker() == "o" for line in figure.axes[0].lines[:experts])  # of one step there is no line


LONG = ["a rather long task name", "another long name", "buy", "like", "share"]
PICTURES = {
    "experts": lambda n: viz.draw_expert_weights(
        viz.expert_weights(AdaTT(6, n, 1, 1, [[5], [4]]), torch.randn(9, 6)), LONG[:n]
    ),
    "many experts": lambda n: viz.draw_expert_weights(
        viz.expert_weights(AdaTT(6, n, 9, 3, [[5], [4]]), torch.randn(9, 6)), LONG[:n]
    ),
    "entropy": lambda n: viz.draw_gate_entropy([[torch.rand(n + 1), torch.rand(n) / 9]] * 3, None, LONG[:n]),
    "entropy of many": lambda n: viz.draw_gate_entropy([[torch.rand(4 * n)]] * 3),
    "connections": lambda n: viz.draw_connections([torch.ones(4, 3), torch.ones(n, 4)], LONG[:n]),
    "few connections": lambda n: viz.draw_connections([torch.ones(n, 1)], LONG[:n]),
    "tree": lambda n: viz.draw_task_tree([[list(range(n))], [[t] for t in range(n)]], LONG[:n]),
}


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("name", PICTURES)
def test_no_text_is_cut_off_or_lies_on_another(name, tasks):
    torch.manual_seed(tasks)
    figure = PICTURES[name](tasks)
    FigureCanvasAgg(figure).draw()
    whole, corners = figure.bbox, []
    for axes in figure.axes:
        labels = [*axes.get_xticklabels(), *axes.get_yticklabels()] if axes.axison else []
        corners += [t.get_window_extent() for t in (*axes.texts, *labels) if t.get_text() and not t.get_rotation()]
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, text.get_text()
    for i, a in enumerate(corners):
        for b in corners[:i]:
            across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across <= 1 or up <= 1


def test_names_of_lines_do_not_lie_on_one_another():
    figure = viz.draw_gate_entropy([[torch.tensor([1.0, 1.0, 0.0, 0.99])]] * 2)
    heights = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    assert all(b - a > 0.1 for a, b in zip(heights, heights[1:], strict=False)) and heights[-1] <= 1.02


def test_draws_connections():
    gates = [torch.tensor([[1.0, 0.0], [0.5, 0.2], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])]
    figure = viz.draw_connections(gates, ["click", "buy"])
    lines = figure.axes[0].lines
    assert len(lines) == 5 + 2  # open ways, and x to the two lowest
    widths = sorted(line.get_linewidth() for line in lines)
    assert widths[-1] == widths[-3] > widths[-4] > widths[-5]
    assert {"click", "buy", "x", "50% open", "33% open"} <= set(texts(figure))
    dashed = {
        t.get_text() for t in figure.axes[0].texts if t.get_bbox_patch() and t.get_bbox_patch().get_linestyle() == "--"
    }
    assert dashed == {"2", "3", "buy"}


def test_draws_a_task_tree():
    partitions = [[[0, 1, 2, 3]], [[0, 3], [1, 2]], [[0], [3], [1, 2]]]
    figure = viz.draw_task_tree(partitions, ["a", "b", "c", "d"])
    found = texts(figure)
    assert found.count("2 tasks") == 3 and found.count("4 tasks") == 1 and "layer 3" in found
    place = {t.get_text(): t.get_position()[0] for t in figure.axes[0].texts}
    assert sorted("abcd", key=place.get) == ["a", "d", "b", "c"]  # branches do not cross


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: viz.expert_weights(SharedBottom(6, 2, [4]), torch.ones(3, 6)),
            TypeError,
            "model must be or hold .* got SharedBottom",
        ),
        (lambda: viz.draw_expert_weights([]), ValueError, "levels must hold at least one level"),
        (
            lambda: viz.draw_expert_weights([viz.ExpertWeights(torch.ones(2, 3), [1, 2], 2)], NAMES),
            ValueError,
            "task_names has 3 names for 2 tasks",
        ),
        (
            lambda: viz.draw_expert_weights([viz.ExpertWeights(torch.ones(2, 3), [1, 1], 2)]),
            ValueError,
            r"weights are 2 x 3: they do not fit \[1, 1\] experts and 2 tasks",
        ),
        (lambda: viz.draw_gate_entropy([]), ValueError, "history must hold"),
        (lambda: viz.draw_gate_entropy([[torch.ones(2)]], [1, 2]), ValueError, "steps has 2 entries for 1 in history"),
        (
            lambda: viz.draw_connections([torch.ones(3, 2), torch.ones(2, 2)]),
            ValueError,
            r"gates\[1\] reads 2 sub-networks \(columns\), gates\[0\] has 3 rows",
        ),
        (
            lambda: viz.draw_gate_entropy([[torch.ones(5)]], task_names=NAMES),
            ValueError,
            "task_names has 3 names for 5 rows at level 0",
        ),
        (
            lambda: viz.draw_gate_entropy([[torch.ones(2)]], task_names=NAMES),
            ValueError,
            "task_names has 3 names for 2 rows at level 0",
        ),
        (lambda: viz.draw_connections([]), ValueError, "gates must hold at least one level"),
        (lambda: viz.draw_connections([torch.ones(3, 2)], NAMES[:2]), ValueError, "output_names has 2 names for 3"),
        (lambda: viz.draw_task_tree([]), ValueError, "partitions must hold at least one layer"),
        (lambda: viz.draw_task_tree([[[0, 1]]], NAMES), ValueError, "task_names has 3 names for 2 tasks"),
        (lambda: viz.draw_task_tree([[[0, 1]], [[0]]]), ValueError, r"partitions\[1\] must hold every task 0..1 once"),
        (
            lambda: viz.draw_task_tree([[[0], [1]], [[0, 1]]]),
            ValueError,
            r"partitions\[1\] joins tasks \[0, 1\], which part before",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
