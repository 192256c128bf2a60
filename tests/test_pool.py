"""The pool of large CPU outputs: memory comes back for the next tensor of its size, and can be given back."""

import pytest
import torch

import mtlkernels as mtl
from mtlkernels import _library

pytestmark = pytest.mark.skipif(not _library.loaded(), reason="the pool is the compiled library's")


def large(rows: int = 4096) -> torch.Tensor:
    return mtl.expert_linear(torch.ones(rows, 4), torch.ones(8, 32, 4), backend="native")  # [4096, 8, 32]: 4 MiB


def test_a_freed_block_serves_the_next_tensor_of_its_size() -> None:
    mtl.empty_cache()
    first = large()
    address = first.data_ptr()
    other = large()
    assert other.data_ptr() != address
    del first
    assert large().data_ptr() == address


def test_views_keep_their_block() -> None:
    view = large()[5:6]
    again = large().fill_(-1.0)
    assert again.data_ptr() != view.data_ptr() and (view == 4.0).all()


def test_empty_cache_gives_back_what_was_freed() -> None:
    mtl.empty_cache()
    kept = large()
    del kept
    assert mtl.empty_cache() == 4096 * 8 * 32 * 4
    assert mtl.empty_cache() == 0


def test_blocks_passed_over_are_given_back() -> None:
    mtl.empty_cache()
    large(8192)
    for _ in range(70):
        large()
    assert mtl.empty_cache() == 4096 * 8 * 32 * 4
