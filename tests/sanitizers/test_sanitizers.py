"""Every operator under the sanitizers; and a planted fault of each kind, which has to be noticed."""

import pytest

from .instrumented import ADDRESS, THREAD, run, tree

TENSOR = "csrc/cpu/tensor.cpp"


def clean(done) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "0 wrong" in done.stdout


def test_addresses_and_undefined_behaviour() -> None:
    clean(run(tree(ADDRESS), ADDRESS, "native", "60", "1"))


def test_addresses_of_the_emulated_device() -> None:
    """The CUDA sources that ship, glue and kernels; every tensor is a block of its own."""
    flags = " ".join(ADDRESS)
    clean(run(tree(ADDRESS), ADDRESS, "emulated", "15", "1", MTLKERNELS_EMULATION_FLAGS=flags))


def test_races_between_threads() -> None:
    clean(run(tree(THREAD), THREAD, "native", "30", "8"))


@pytest.mark.slow
def test_a_byte_too_little_is_noticed() -> None:
    """Scratch that is 64 bytes short, behind a kernel's back."""
    short = (
        TENSOR,
        "const size_t whole = rounded(bytes, kGrain);",
        "const size_t whole = rounded(bytes, kGrain) - 64;",
    )
    done = run(tree(ADDRESS, short), ADDRESS, "native", "60", "1")
    assert done.returncode and "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
def test_a_race_is_noticed() -> None:
    """Scratch that threads share."""
    shared = (TENSOR, "thread_local Buffer buffers[6];", "static Buffer buffers[6];")
    done = run(tree(THREAD, shared), THREAD, "native", "30", "8")
    assert done.returncode and "ThreadSanitizer" in done.stderr
