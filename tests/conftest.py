import pytest

from resnet_flax.machine.runtime import add_flag, configure_runtime

configure_runtime()  # before any test starts JAX's backend


def pytest_configure(config: pytest.Config) -> None:
    # LLVM's share is half of the seconds in which small programs compile; the longer proofs, and
    # `pytest -m parity`, compile as users do.
    if "not slow" in config.option.markexpr:
        add_flag("--xla_backend_optimization_level=0")


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real data, (train, test); prepared on first use."""
    from resnet_flax.data import load_fashion_mnist

    return load_fashion_mnist()


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """The folder of a finished run; tests that change it take a copy."""
    from tests.support.finished_run import finish_run, new_network

    folder = tmp_path_factory.mktemp("finished") / "run"
    return finish_run(folder, new_network(flip=True), learning_rate=0.1, test_examples=60)


@pytest.fixture
def torchvision_checkpoint(tmp_path, monkeypatch):
    """What README and docs ask the reader to have: torchvision's ResNet-18, in the current folder.

    The folder is a temporary one.
    """
    import torch
    from safetensors.torch import save_file

    from tests.support.torch_reference import TorchvisionResNet

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = TorchvisionResNet((2, 2, 2, 2), 3, 1000, "imagenet")
    save_file(network.state_dict(), "checkpoint.safetensors")


@pytest.fixture
def hub(tmp_path_factory):
    """The hub and torchvision's server on loopback, with caches of their own."""
    from tests.support.hub_server import hub_server

    with hub_server(tmp_path_factory.mktemp("caches")) as server:
        yield server
