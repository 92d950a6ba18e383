"""``resnet-flax demo``: what is refused before a page opens."""

import sys

import numpy as np
import pytest
from jax import tree

from resnet_flax.commands import demo
from resnet_flax.commands.command_line import run_command
from resnet_flax.inference.pretrained import save_weights
from tests.support.finished_run import new_network, new_variables, write_pretrained

MODULE = "resnet_flax.inference.demo"


@pytest.fixture
def program(monkeypatch, capsys):
    """The program in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(demo, "keep_compiled_programs", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["resnet-flax demo", *map(str, arguments)])
        code = run_command(demo.main)
        return (code, *capsys.readouterr())

    return run


def test_without_the_extra_it_is_one_line(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    assert program("anywhere") == (
        2,
        "",
        "resnet-flax demo: error: the page needs Gradio, which is not here: "
        "install it by pip install 'resnet_flax[demo]'\n",
    )


@pytest.fixture
def without_page(monkeypatch):
    """Nothing is served."""
    __import__(MODULE)
    served = []
    monkeypatch.setattr(sys.modules[MODULE], "serve", lambda *given, **flags: served.append(flags))
    return served


@pytest.mark.foreign
def test_a_broken_network_is_refused_before_the_page_opens(program, without_page, tmp_path):
    code, said, error = program(tmp_path / "absent")
    assert (code, said) == (2, "")
    assert "holds no trained network" in error
    network = new_network()
    write_pretrained(tmp_path, network)
    damaged = tree.map(lambda leaf: leaf * np.nan, new_variables(network))
    save_weights(tmp_path, network, damaged)
    code, said, error = program(tmp_path)
    assert (code, said) == (2, "")
    assert error.endswith("outputs are not finite numbers: its weights are damaged\n")
    assert error.count("\n") == 1
    write_pretrained(tmp_path, new_network(image_shape=(28, 28, 2)))
    code, said, error = program(tmp_path)
    assert (code, said) == (2, "")
    assert "takes images of 2 channels" in error
    assert without_page == []


@pytest.mark.foreign
def test_the_browser_opens_unless_told_otherwise(program, without_page, shared_run, monkeypatch):
    monkeypatch.setattr(sys.modules[MODULE], "demo_page", lambda *_: None)
    assert program(shared_run.folder) == (0, "", "")
    assert program(shared_run.folder, "--no-browser", "--port", "8000") == (0, "", "")
    assert without_page == [{"in_browser": True}, {"in_browser": False}]


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_does_not_exist(port, program, capsys):
    with pytest.raises(SystemExit) as stop:
        program("anywhere", f"--port={port}")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"resnet-flax demo: error: --port must be from 0 to 65535, not {port}")
    assert error.count("\n") == 1
