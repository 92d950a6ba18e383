"""The computer a run is on: its devices, its processes, its files, and what its user asks of it."""

import lazy_loader

# Names load when first used: `resnet_flax.data` needs the files, and no JAX.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
