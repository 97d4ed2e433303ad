"""The engine on GPUs: kernels compiled ahead for all of them, their limits, and one script to run on one."""
