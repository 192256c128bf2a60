"""The kernels compiled to machine code for real GPUs, which needs none: no spills, and tensor cores where expected."""

import copy

import pytest
from compile_table import COMMAND, compile_for, differences, rows, same_compiler, spills, stored

pytest.importorskip("triton")


def check(found: list[dict]) -> None:
    assert found
    for one in found:
        assert not spills(one), f"spills: {one}"
        assert one["shared"] <= {80: 163, 90: 227, 100: 227}[one["target"]] * 1024, f"too much shared memory: {one}"
        if "precision" not in one:
            continue
        cores = one["dtype"] != "fp32" or one["precision"] == "tf32"
        instructions = one["wgmma"] + one["tcgen05"] + one["mma"]
        assert bool(instructions) == cores, f"tensor cores: {one}"
        # Tiles of 16 to 64 rows are below what the larger instructions take.
        if cores and one["shape"][0] >= 64 and one["target"] == 90:
            assert one["wgmma"], f"no wgmma: {one}"
        if cores and one["shape"][0] >= 64 and one["target"] == 100:
            assert one["tcgen05"], f"no tcgen05: {one}"


def as_stored(target: int) -> None:
    if not same_compiler():
        pytest.skip("the table was made with another version of Triton")
    changed = differences(stored(target), rows(compile_for(target)))
    assert not changed, "\n".join([*changed, f"if that was meant: {COMMAND}"])


def test_hopper():
    check(compile_for(90))


def test_hopper_is_as_the_table_says():
    as_stored(90)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 100])
def test_others_are_as_the_table_says(target):
    as_stored(target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_configuration(target):
    check(compile_for(target, "all"))


def test_the_table_knows_each_architecture_s_instructions():
    """wgmma on Hopper, tcgen05 on Blackwell, mma.sync before; none in the exact float32 products."""
    for target, best in ((80, "mma"), (90, "wgmma"), (100, "tcgen05")):
        found = {key: row["instructions"] for key, row in stored(target).items()}
        linear = [kind for key, kind in found.items() if "expert_linear.forward_kernel" in key and "=bf16" in key]
        exact = [kind for key, kind in found.items() if "dtype=fp32" in key]
        assert best in linear and exact and set(exact) == {"none"}


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("registers", +17, True),
        ("registers", +16, False),
        ("shared", 4096, False),
        ("shared", 60000, True),
        ("spills", True, True),
        ("instructions", "other", True),
        ("warps", 1, True),
    ],
)
def test_differences_tell_a_change_that_matters(name, value, told):
    before = {"a": {"instructions": "mma", "spills": False, "warps": 4, "tile": {}, "registers": 80, "shared": 8192}}
    after = copy.deepcopy(before)
    after["a"][name] = before["a"][name] + value if name in ("registers", "shared") else value
    assert bool(differences(before, after)) == told


def test_differences_tell_rows_that_come_and_go():
    assert differences({"a": {}}, {"b": {}}) == ["no longer compiled: a", "not in the table: b"]
    assert differences({}, {"b": {}}, everything=False) == []
