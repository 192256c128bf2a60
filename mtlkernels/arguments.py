"""Checks of constructor arguments, shared by the modules and the networks."""

from collections.abc import Collection, Sequence


def count(name: str, value: int, least: int) -> int:
    """value, an int of at least `least`; TypeError or ValueError otherwise, naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def counts(name: str, values: Sequence[int], least: int) -> list[int]:
    """values as a list of ints of at least `least`; TypeError or ValueError otherwise, naming the argument."""
    if isinstance(values, (str, int)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of ints; got {values!r}")
    return [count(f"{name}[{i}]", value, least) for i, value in enumerate(values)]


def is_one_of(value: object, names: Collection[str]) -> bool:
    """Whether value is one of the names; a list or another thing that has no hash is none."""
    return isinstance(value, str) and value in names


def per_layer(name: str, value, layers: int) -> list:
    """One value for every layer, or a sequence with one for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != layers:
            raise ValueError(f"{name} has {len(value)} entries for {layers} layers")
        return list(value)
    return [value] * layers
