import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.errors import InputError
from resnet_flax.machine.runtime import (
    BARRIER_FLAG,
    YNNPACK_FLAG,
    add_flag,
    configure_runtime,
    device_name,
    keep_compiled_programs,
    start_backend,
)
from tests.support.environment import jax_setting, without_devices, without_home

# jax#39103: a product of small matrices, squared and summed by row.
CANARY = """
import resnet_flax; resnet_flax.configure_runtime()
import jax, jax.numpy as jnp
rows = jnp.stack([jnp.arange(32_769.0)] + [jnp.zeros(32_769)] * 2, axis=1)
function = jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))
print(float(jax.jit(function)(rows)[-1]))
"""


def run_canary(environment: dict[str, str]) -> float:
    process = subprocess.run(
        [sys.executable, "-c", CANARY],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(process.stdout)


def test_the_reported_wrong_reduction_is_right_under_our_settings(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    assert run_canary(dict(os.environ)) == 32_768.0**2


@pytest.mark.parametrize(
    "shape", [(256, 48, 48, 64), (256, 24, 24, 64), (256, 6, 6, 256), (30_001, 65), (60_000, 10)]
)
def test_reductions_of_realistic_size_are_right(shape):
    values = np.random.default_rng(0).normal(0.5, 1, shape).astype(np.float32)
    axes = tuple(range(len(shape) - 1))

    def reductions(x):
        mean = x.mean(axes)
        return mean, jnp.square(x - mean).mean(axes), x.max(axes)

    mean, var, largest = jax.jit(reductions)(values)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(var, exact.var(axes), rtol=1e-5)
    np.testing.assert_array_equal(largest, values.max(axes))


def test_what_the_user_set_wins(monkeypatch):
    flags = f"{YNNPACK_FLAG}dot --xla_disable_hlo_passes=fusion --xla_dump_to=x"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    configure_runtime()
    assert os.environ["XLA_FLAGS"] == flags
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


def test_a_flag_that_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    add_flag("--xla_no_flag_of_any_release=1")  # XLA would end the process
    assert os.environ["XLA_FLAGS"] == ""
    for flag in (YNNPACK_FLAG, BARRIER_FLAG, "--xla_gpu_deterministic_ops=true"):
        add_flag(flag)
        assert flag in os.environ["XLA_FLAGS"]


def test_flags_are_added_to_the_users(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    configure_runtime()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {YNNPACK_FLAG} {BARRIER_FLAG}"
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_barriers_are_kept_only_where_nothing_but_the_cpu_computes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("resnet_flax.machine.runtime.accelerator_expected", lambda: True)
    configure_runtime()
    assert os.environ["XLA_FLAGS"] == YNNPACK_FLAG


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("cpu", "cpu"),
        ("gpu", "cuda:3"),  # AMD's too: PyTorch calls them so
        ("rocm", "cuda:3"),
        ("tpu", "tpu:3"),
        ("METAL", "metal:3"),
    ],
)
def test_the_devices_name_is_pytorchs(platform, name, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform, id=3)])
    assert device_name() == name


def test_compiled_programs_are_kept_in_a_private_folder(tmp_path):
    program = (
        "from resnet_flax.machine.runtime import keep_compiled_programs; keep_compiled_programs();"
        "import jax; print(jax.config.values['jax_compilation_cache_dir'])"
    )

    def folder(**environment: str) -> str:
        process = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return process.stdout.strip()

    kept = Path(folder(XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert kept.parent == tmp_path / "cache" / "resnet_flax"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert folder(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == str(tmp_path)
    (tmp_path / "file").write_text("")
    assert folder(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems' allocators have no such setting"
)
def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource
import numpy as np
from resnet_flax.machine.runtime import configure_runtime
configure_runtime()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(50_000_000)  # 400 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(process.stdout) < 100  # of 97,656 pages; 191 huge ones


def test_without_a_home_nothing_is_kept(monkeypatch):
    without_home(monkeypatch)
    jax_setting(monkeypatch, "jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("kept"))
    keep_compiled_programs()


@pytest.mark.parametrize(
    ("platforms", "said", "line"),
    [
        (
            "cuda",
            "",
            "JAX_PLATFORMS is 'cuda', which JAX cannot use here: unset it, or set it to cpu",
        ),
        (
            "cuda,cpu",
            "no\ndriver (set JAX_PLATFORMS='' to automatically choose an available backend)",
            "JAX_PLATFORMS is 'cuda,cpu', which JAX cannot use here (no driver): unset it, or set "
            "it to cpu",
        ),
        ("", "no driver", "JAX can use no device (no driver)"),
    ],
)
def test_platforms_that_are_not_there_are_named(monkeypatch, platforms, said, line):
    without_devices(monkeypatch, platforms, said)
    with pytest.raises(InputError) as error:
        start_backend()
    assert str(error.value) == line
