"""The three models of the demonstration: small enough for two cores, with the memory of large ones.

The task: for each prompt there is a sequence of tokens that the reward model likes; a token in its place is worth its
share of the whole. The policy is a table of logits, learns by policy gradients against the mean of its group (GRPO),
and is held near the reference by a KL penalty. Every weight is read from VRAM when it is used, and written back there.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import numpy as np

from ray_integration.demo import vram

PROMPTS: Final = 6
LENGTH: Final = 6
VOCABULARY: Final = 8
GROUP: Final = 96
_LEARNING_RATE: Final = 3.0
_KL_WEIGHT: Final = 0.01
_SHAPE: Final = (PROMPTS, LENGTH, VOCABULARY)
Array = Any


class _Weights:
    """A table of floats at the start of an allocation; the rest only takes room, as a model's other layers would."""

    def __init__(self, vram_bytes: int, table: Array) -> None:
        self._memory = vram.allocate(vram_bytes)
        self._bytes = table.nbytes
        self._end = vram_bytes
        self.store(table)

    def load(self) -> Array:
        raw = self._memory.read(0, self._bytes)
        return np.frombuffer(raw, dtype=np.float64).reshape(_SHAPE).copy()

    def store(self, table: Array) -> None:
        self._memory.write(0, table.astype(np.float64).tobytes())

    def digest(self) -> int:
        """Of the table and of the far end of the allocation."""
        far = self._memory.read(self._end - 4096, 4096)
        return zlib.crc32(far, zlib.crc32(self._memory.read(0, self._bytes)))


class Policy:
    def __init__(self, vram_bytes: int) -> None:
        self._weights = _Weights(vram_bytes, np.zeros(_SHAPE))
        self._random = np.random.default_rng(1)

    def generate(self) -> Array:
        """Samples: tokens[prompt, sample, position]."""
        shares = _softmax(self._weights.load()).cumsum(axis=-1)
        drawn = self._random.random((PROMPTS, GROUP, LENGTH, 1))
        return (drawn > shares[:, None]).sum(axis=-1).clip(max=VOCABULARY - 1)

    def update(self, tokens: Array, rewards: Array, reference: Array) -> float:
        """One step up the gradient; the mean reward that it was made from."""
        logits = self._weights.load()
        shares = _softmax(logits)
        spread = rewards.std(axis=1, keepdims=True) + 1e-6
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / spread
        chosen = np.eye(VOCABULARY)[tokens] - shares[:, None]
        gradient = (advantages[:, :, None, None] * chosen).mean(axis=1)
        drift = np.log(shares) - np.log(_softmax(reference))
        kl_gradient = shares * (drift - (shares * drift).sum(axis=-1, keepdims=True))
        self._weights.store(logits + _LEARNING_RATE * (gradient - _KL_WEIGHT * kl_gradient))
        return float(rewards.mean())

    def digest(self) -> int:
        return self._weights.digest()


class Reward:
    def __init__(self, vram_bytes: int) -> None:
        liked = np.random.default_rng(2).integers(VOCABULARY, size=(PROMPTS, LENGTH))
        self._weights = _Weights(vram_bytes, np.eye(VOCABULARY)[liked])

    def score(self, tokens: Array) -> Array:
        """Of each sample, between 0 and 1: rewards[prompt, sample]."""
        table = self._weights.load()
        places = np.arange(LENGTH)
        worth = [table[p, places, tokens[p]].mean(axis=-1) for p in range(PROMPTS)]
        return np.stack(worth)

    def digest(self) -> int:
        return self._weights.digest()


class Reference:
    def __init__(self, vram_bytes: int) -> None:
        self._weights = _Weights(vram_bytes, np.zeros(_SHAPE))

    def logits(self) -> Array:
        return self._weights.load()

    def digest(self) -> int:
        return self._weights.digest()


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
