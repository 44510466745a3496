"""The picture of a demonstration: who held the GPU when, and the reward beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_COLOURS: Final = ("#3b6fb6", "#d1793a", "#4f9a5b")


def draw(
    path: Path,
    held: Mapping[str, Sequence[tuple[float, float]]],
    rewards: Sequence[tuple[float, float]],
    title: str,
) -> bool:
    """Writes a PNG. ``held``: for each model (begin, end) in seconds; ``rewards``: (when, mean reward).

    False, and no file, where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 5), height_ratios=(2, 3), layout="constrained"
    )
    for row, spans in enumerate(held.values()):
        bars = [(begin, end - begin) for begin, end in spans]
        above.broken_barh(bars, (row - 0.4, 0.8), color=_COLOURS[row % len(_COLOURS)])
    above.set_yticks(range(len(held)), list(held))
    above.invert_yaxis()
    above.set_title(f"{title}\nwho held the GPU")
    below.plot([at for at, _ in rewards], [value for _, value in rewards], marker="o", color="#444")
    below.set_ylim(0, 1)
    below.set_ylabel("mean reward")
    below.set_xlabel("seconds")
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
