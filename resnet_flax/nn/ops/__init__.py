"""Kernels that are quick on the platform a program is compiled for, with plain JAX's values."""
