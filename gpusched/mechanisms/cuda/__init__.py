"""Real NVIDIA GPUs: the driver's checkpoint calls and NVML, blocking, for the helper process that runs them."""
