"""A task's own embeddings, against torch.nn.Embedding, one a task and field."""

import pytest
import torch
from torch import nn

from python_models.balancing import TaskBiasEmbedding, param_groups

SIZES = (4, 1, 7, 3)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("fields", [None, [2], [3, 0]])
@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_one_embedding_a_task_and_field(sparse, dim, fields, rows, dtype):
    bias = TaskBiasEmbedding(2, SIZES, fields, dim, sparse=sparse).double()
    nn.init.normal_(bias.table)
    chosen = range(4) if fields is None else fields
    ids = torch.stack([torch.randint(0, size, (rows,)) for size in SIZES], 1).to(dtype)
    slices = bias.table.detach().split([SIZES[f] for f in chosen])
    plain = [[nn.Embedding.from_pretrained(s.view(-1, 2, dim)[:, t], freeze=False) for s in slices] for t in range(2)]
    found, expected = bias(ids), []
    for t in range(2):
        columns = [one(ids[:, f]) for one, f in zip(plain[t], chosen, strict=True)]
        expected.append(sum(columns).squeeze(1) if dim == 1 else torch.cat(columns, 1))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found.shape == ((rows, 2) if dim == 1 else (rows, 2, bias.out_features))
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad)
    tables = [torch.stack([plain[t][i].weight.grad for t in range(2)], 1).flatten(1) for i in range(len(chosen))]
    assert bias.table.grad.is_sparse == sparse
    torch.testing.assert_close(bias.table.grad.to_dense(), torch.cat(tables), rtol=1e-12, atol=1e-12)


def test_start_group_and_state():
    bias = TaskBiasEmbedding(3, SIZES)
    assert (bias.table == 0).all() and set(bias.state_dict()) == {"table"}
    wide = TaskBiasEmbedding(3, [5000], dim=4)
    assert 0.009 < wide.table.std() < 0.011
    assert [group["name"] for group in param_groups(bias, 1.0)] == ["bias_embedding"]


def test_bad_arguments():
    for error, message, options in (
        (ValueError, "fields must be different ones of the 4", {"fields": [1, 1]}),
        (ValueError, "fields must be different ones of the 4", {"fields": [4]}),
        (ValueError, "fields must be different ones of the 4", {"fields": []}),
        (ValueError, "dim must be at least 1", {"dim": 0}),
        (TypeError, r"fields\[0\] must be an int", {"fields": ["device"]}),
    ):
        with pytest.raises(error, match=message):
            TaskBiasEmbedding(2, SIZES, **options)
    with pytest.raises(ValueError, match=r"ids must be \[B,4\]; got shape \(2, 3\)"):
        TaskBiasEmbedding(2, SIZES)(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        TaskBiasEmbedding(2, SIZES)(torch.full((1, 4), 99))
