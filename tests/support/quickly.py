"""How tests compile what is compared, not timed."""

COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""LLVM's share of the work takes half of a small test's seconds, and changes no formulation."""
