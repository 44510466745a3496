"""The loop: rollout, score, train, with exactly the models of a phase on the GPU, and what came of each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from ray_integration import Phases

CALL_TIMEOUT_S = 120.0
ROLES = ("policy", "reward", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """``swap_s``: seconds that the two swaps of this step took."""

    number: int
    reward: float
    swap_s: float
    took_s: float
    contents_right: bool


@dataclass(slots=True, kw_only=True)
class History:
    """Seconds since the loop began. ``held``: when each role was on the GPU; a swap under way counts for nobody."""

    held: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {role: [] for role in ROLES}
    )
    rewards: list[tuple[float, float]] = field(default_factory=list)
    swaps_s: list[float] = field(default_factory=list)


class Loop:
    """Runs over handles of the three roles. What it leaves on the GPU is the policy."""

    def __init__(self, models: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._models = models
        self._clock = clock
        self._began = clock()
        self._on: dict[str, float] = {}
        self._digests: dict[str, int] = {}
        self.history = History()
        policy, reward, reference = (models[role] for role in ROLES)
        self._roles = {
            "rollout": ("policy",),
            "score": ("reward", "reference"),
            "train": ("policy",),
        }
        self._phases = Phases({"rollout": policy, "score": [reward, reference], "train": policy})

    def steps(self, count: int) -> Iterator[Step]:
        """Performs the steps one after the other."""
        self._enter("rollout")
        for number in range(1, count + 1):
            yield self._step(number)
        self._leave()

    def _step(self, number: int) -> Step:
        begun = self._clock()
        policy, reward, reference = (self._models[role] for role in ROLES)
        tokens = policy.generate.remote()  # stays a reference: the driver never holds the samples
        ray.wait([tokens], timeout=CALL_TIMEOUT_S)
        swap_s, right = self._enter("score")
        rewards, logits = reward.score.remote(tokens), reference.logits.remote()
        ray.wait([rewards, logits], num_returns=2, timeout=CALL_TIMEOUT_S)
        back_s, right_too = self._enter("train")
        mean = ray.get(policy.update.remote(tokens, rewards, logits), timeout=CALL_TIMEOUT_S)
        self._digests.pop("policy")  # it has other weights now
        self.history.rewards.append((self._clock() - self._began, mean))
        return Step(
            number=number,
            reward=mean,
            swap_s=swap_s + back_s,
            took_s=self._clock() - begun,
            contents_right=right and right_too,
        )

    def _enter(self, phase: str) -> tuple[float, bool]:
        """Brings the models of a phase on; how long that took, and whether they have the contents they went with."""
        self._remember()
        self._leave()
        swap_s = self._phases.phase(phase).duration_s
        self._on = dict.fromkeys(self._roles[phase], self._clock() - self._began)
        self.history.swaps_s.append(swap_s)
        known = {role: self._digests[role] for role in self._on if role in self._digests}
        return swap_s, all(self._digest(role) == digest for role, digest in known.items())

    def _remember(self) -> None:
        for role in self._on:
            self._digests[role] = self._digest(role)

    def _digest(self, role: str) -> int:
        found: int = ray.get(self._models[role].digest.remote(), timeout=CALL_TIMEOUT_S)
        return found

    def _leave(self) -> None:
        now = self._clock() - self._began
        for role, since in self._on.items():
            self.history.held[role].append((since, now))
        self._on = {}
