import jax
import pytest

from resnet_flax.nn.ops import convolution


@pytest.fixture
def winograd_everywhere(monkeypatch):
    """Winograd's convolution wherever it can be; what JAX has traced knows nothing of that."""
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(convolution, "WINOGRAD_PIXELS", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()
