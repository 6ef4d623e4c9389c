"""Triton kernels and their plain twins; imports torch and triton, nothing of ours."""
