"""D2L's residual network in JAX and Flax Linen, equal to its PyTorch original."""

import lazy_loader

# Names load when first used: JAX, Flax and Orbax take seconds. The list is `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
