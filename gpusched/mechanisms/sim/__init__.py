"""Simulated GPUs: VRAM that is host memory, a driver that really moves it, and failures on order."""
