"""Which GPU goes where: the full permutation that the driver wants for a move to other GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def permutation(
    gpus: Sequence[str], source: Sequence[str], target: Sequence[str]
) -> dict[str, str]:
    """A permutation of all ``gpus`` that takes ``source[i]`` to ``target[i]``.

    The driver refuses a partial map (measured on 580: INVALID_VALUE), even when the process sees one GPU alone. GPUs
    that were displaced go where room came free, in order, and everything else stays.

    Raises ValueError when the lists differ in length, repeat a GPU or name one that does not exist.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} GPUs cannot move to {len(target)}")
    for side in (source, target):
        if len(set(side)) != len(side) or not set(side) <= set(gpus):
            raise ValueError("each GPU must exist and be named once")
    mapping = dict(zip(source, target, strict=True))
    displaced = [g for g in gpus if g in mapping.values() and g not in mapping]
    vacated = [g for g in gpus if g in mapping and g not in mapping.values()]
    mapping.update(zip(displaced, vacated, strict=True))
    return {gpu: mapping.get(gpu, gpu) for gpu in gpus}


def onward(
    moved: Mapping[str, str] | None, wanted: Mapping[str, str] | None
) -> dict[str, str] | None:
    """The map that takes contents to where ``wanted`` sends them from home, when ``moved`` took them away before.

    Both are full permutations or None (nobody moves), and so is the result.
    """
    found = {
        (moved or {}).get(gpu, gpu): (wanted or {}).get(gpu, gpu)
        for gpu in (*(moved or ()), *(wanted or ()))
    }
    return found if any(source != target for source, target in found.items()) else None
