"""A GPU program to freeze: fills VRAM, and says at every tick whether the contents are still right.

Run as ``python -m gpusched.workload --vram 1G``; see ``__main__.py``.
"""
