"""Where a signal stops a program at once, and where later."""

import signal
import subprocess
import sys
import threading

import pytest

from resnet_flax.machine.interruption import Interrupted, Interruption


def test_a_signal_stops_at_once():
    def program() -> None:
        with Interruption():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")

    with pytest.raises(Interrupted) as stop:
        program()
    assert stop.value.signum == signal.SIGTERM


def test_deferred_it_is_left_to_the_reader():
    with Interruption() as interruption:
        with interruption.deferred():
            signal.raise_signal(signal.SIGINT)
        assert interruption.requested == signal.SIGINT


def test_postponed_it_stops_at_the_end():
    done = []

    def program() -> None:
        with Interruption() as interruption:
            with interruption.postponed():
                signal.raise_signal(signal.SIGTERM)
                done.append("the block")
            pytest.fail("went on")

    with pytest.raises(Interrupted) as stop:
        program()
    assert done == ["the block"]
    assert stop.value.signum == signal.SIGTERM


def test_without_a_signal_nothing_happens():
    with Interruption() as interruption, interruption.postponed():
        pass
    assert interruption.requested is None


def test_a_signal_that_python_would_swallow_stops_too():
    program = """
import gc, signal
from resnet_flax.machine.interruption import Interruption
gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGTERM))
with Interruption():
    gc.collect()
    print("went on")
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stdout == ""
    assert process.stderr.endswith("interrupted: nothing was lost\n")
    assert "Traceback" not in process.stderr


def test_in_a_thread_it_watches_for_nothing():
    before, found = signal.getsignal(signal.SIGINT), []

    def program() -> None:
        with Interruption() as interruption, interruption.postponed():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=program)
    thread.start()
    thread.join()
    assert found == [before]
