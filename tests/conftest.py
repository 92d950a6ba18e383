import pytest

from resnet_flax.runtime import configure_runtime

configure_runtime()  # before any test starts JAX's backend


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real data, (train, test); prepared on first use."""
    from resnet_flax.data import load_fashion_mnist

    return load_fashion_mnist()
