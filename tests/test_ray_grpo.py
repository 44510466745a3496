"""The arithmetic of ``examples/in_ray/grpo.py``, with NumPy's arrays, and with tensors where there is PyTorch.

What it makes of a language model is seen by running the example: ``test_ray_examples.py`` and, on a GPU,
``gpu/test_ray_grpo_gpu.py``; both need PyTorch and transformers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from daemons import ROOT

pytestmark = pytest.mark.ray
Make = Callable[[Any], Any]


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo", ROOT / "examples" / "in_ray" / "grpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["numpy", "torch"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an array of either kind."""
    if request.param == "numpy":
        return lambda values: np.array(values, dtype=np.float64)
    torch = pytest.importorskip("torch")
    return lambda values: torch.tensor(values, dtype=torch.float64)


def test_a_sample_is_measured_against_its_own_group(grpo: ModuleType, make: Make) -> None:
    found = grpo.advantages(make([[1.0, 2.0, 3.0], [101.0, 102.0, 103.0], [0.0, 0.0, 3.0]]))
    spread = math.sqrt(1.5)
    wanted = [[-spread, 0, spread], [-spread, 0, spread], [-math.sqrt(0.5)] * 2 + [math.sqrt(2)]]
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5)


def test_a_group_of_equals_teaches_nothing(grpo: ModuleType, make: Make) -> None:
    assert np.asarray(grpo.advantages(make([[0.25] * 4]))).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain"),
    [
        (1.0, 2.0, 2.0),
        (1.5, 2.0, 2.4),  # no more to gain by going further
        (0.5, 2.0, 1.0),
        (1.5, -2.0, -3.0),  # a bad sample that became likelier is pushed back in full
        (0.5, -2.0, -1.6),
    ],
)
def test_the_ratio_is_clipped_where_it_gains(
    grpo: ModuleType, make: Make, ratio: float, advantage: float, gain: float
) -> None:
    old = make([[-1.0, -2.0]])
    new = make([[-1.0 + math.log(ratio), -2.0 + math.log(ratio)]])
    found = float(grpo.loss(new, old, new, make([[advantage]])))  # as near as can be: no penalty
    assert found == pytest.approx(-gain)


def test_drift_from_the_reference_costs_either_way(grpo: ModuleType, make: Make) -> None:
    new, none = make([[-1.0]]), make([[0.0]])
    costs = [float(grpo.loss(new, new, make([[at]]), none)) for at in (-1.0, -1.5, -0.5)]
    wanted = [0, math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]
    assert costs == pytest.approx([grpo.KL_WEIGHT * each for each in wanted])
    assert min(costs[1:]) > 0


def test_a_policy_that_is_a_table_learns_what_is_rewarded(grpo: ModuleType) -> None:
    """One token out of four, one of them worth something; the gradient of the loss by differences."""
    random = np.random.default_rng(1)
    logits = np.zeros(4)

    def log_probs(of: Any, tokens: Any) -> Any:
        return (of - np.log(np.exp(of).sum()))[tokens][:, None]

    reference = logits.copy()
    for _ in range(30):
        shares = np.exp(logits) / np.exp(logits).sum()
        tokens = random.choice(4, size=32, p=shares)
        gains = grpo.advantages((tokens == 2).astype(float)[None]).reshape(-1, 1)
        known = log_probs(logits, tokens), log_probs(reference, tokens), gains
        slope = [
            (
                grpo.loss(log_probs(logits + step, tokens), *known)
                - grpo.loss(log_probs(logits - step, tokens), *known)
            )
            / 2e-5
            for step in np.eye(4) * 1e-5
        ]
        logits = logits - np.array(slope)
    assert np.exp(logits)[2] / np.exp(logits).sum() > 0.9
