"""``make demo``: an RLHF loop in Ray whose models do not fit on the GPU together, swapped by phases.

On a real GPU where there is a driver, else on simulated ones. Brings its own daemon and its own Ray; both end with it.
"""
