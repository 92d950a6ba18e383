import pytest

from resnet_flax.runtime import configure_runtime

configure_runtime()  # before any test starts JAX's backend


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real data, (train, test); prepared on first use."""
    from resnet_flax.data import load_fashion_mnist

    return load_fashion_mnist()


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """The folder of a finished run; tests that change it take a copy."""
    from tests.finished_run import finish_run, new_network

    folder = tmp_path_factory.mktemp("finished") / "run"
    return finish_run(folder, new_network(flip=True), learning_rate=0.1, test_examples=60)
