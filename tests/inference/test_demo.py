"""The page as its function, over HTTP, and in a browser."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from resnet_flax.errors import InputError
from resnet_flax.inference import predict
from resnet_flax.nn.preprocessing import Normalization
from tests.support.finished_run import new_network, new_variables, write_pretrained
from tests.support.image_files import random_image

ROOT = Path(__file__).parents[2]
GREY = Normalization((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
COLOURED = {"image_shape": (16, 16, 3), "image_size": 16, "fit": "crop", "normalization": GREY}


def answers(path: Path, **changes):
    """What the page's function gives of a picture: the bars, and the network's view of it."""
    from resnet_flax.inference.demo import demo_page

    network = new_network(**changes)

    async def make():  # elsewhere Gradio makes event loops, and leaves them open
        return demo_page(network, new_variables(network))

    (function,) = asyncio.run(make()).fns.values()
    (answer,) = function.fn(str(path))
    return answer


@pytest.mark.foreign
def test_the_network_saw_its_own_pixels_enlarged(tmp_path):
    random_image(0, (16, 16)).save(tmp_path / "a.png")
    bars, seen = answers(tmp_path / "a.png", **COLOURED)
    assert len(bars) == 5
    assert seen["label"] == "What the network saw: 16x16 pixels"
    enlarged = np.asarray(random_image(0, (16, 16)).resize((448, 448), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(seen["value"], enlarged)


@pytest.mark.foreign
def test_it_says_when_it_inverted(tmp_path):
    pixels = np.full((28, 28), 255, np.uint8)
    pixels[8:20, 8:20] = 40
    Image.fromarray(pixels).save(tmp_path / "light.png")
    _, seen = answers(tmp_path / "light.png")
    assert seen["label"] == "What the network saw: 28x28 pixels, inverted: light background"
    np.testing.assert_array_equal(seen["value"][::16, ::16], 255 - pixels)


@pytest.mark.foreign
def test_classes_of_one_name_keep_their_bars(tmp_path):
    random_image(0).save(tmp_path / "a.png")
    bars, _ = answers(tmp_path / "a.png", classes=("crane",) * 10)
    assert [*bars] == ["crane", *(f"crane ({place})" for place in range(2, 6))]


@pytest.mark.foreign
def test_a_port_in_use_is_one_line():
    from resnet_flax.inference.demo import serve

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used .Address already in use"):
            serve(None, port)


@pytest.mark.foreign
def test_over_http_from_the_start_to_ctrl_c(tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    turned = Image.Exif()
    turned[0x0112] = 6
    random_image(0, (40, 30)).save(tmp_path / "turned.jpg", exif=turned)
    write_bad(tmp_path)
    with demo(tmp_path) as (address, process):
        assert urlsplit(address).hostname == "127.0.0.1"
        client = Client(address, verbose=False, download_files=False)
        label, _ = client.predict(handle_file(tmp_path / "turned.jpg"), api_name="/predict")
        found = [(bar["label"], bar["confidence"]) for bar in label["confidences"]]
        (expected,) = predict(tmp_path / "run", [tmp_path / "turned.jpg"], top=5)
        assert [name for name, _ in found] == [name for name, _ in expected.top]
        np.testing.assert_allclose([n for _, n in found], [n for _, n in expected.top], rtol=1e-5)
        for name, why in {"cut.png": "image file is truncated", "text.png": "not a PNG"}.items():
            with pytest.raises(AppError, match=rf"^cannot read {name} \({why}"):
                client.predict(handle_file(tmp_path / name), api_name="/predict")
        label, _ = client.predict(None, api_name="/predict")
        assert not label.get("confidences")
        assert [*(tmp_path / "uploads").rglob("*.jpg")]
        process.send_signal(signal.SIGINT)
        said, error = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "")
    assert error == "python -m resnet_flax demo: interrupted: nothing was lost\n"
    assert not [*(tmp_path / "uploads").rglob("*.jpg")]


@pytest.mark.browser
def test_in_a_browser(tmp_path):
    from playwright.sync_api import expect, sync_playwright

    random_image(0, (40, 30)).save(tmp_path / "good.png")
    write_bad(tmp_path)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with demo(tmp_path) as (address, process), sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        hosts = set()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(address)
        picture = page.locator("input[type=file]")
        picture.set_input_files(tmp_path / "good.png")
        bars = page.locator(".confidence-set")
        expect(bars).to_have_count(5)
        (expected,) = predict(tmp_path / "run", [tmp_path / "good.png"], top=5)
        for bar, (name, share) in zip(bars.all(), expected.top, strict=True):
            expect(bar).to_contain_text(name)
            expect(bar).to_contain_text(f"{share * 100:.0f}%")
        expect(page.get_by_text("What the network saw: 16x16 pixels")).to_have_count(1)
        expect(page.locator("img")).to_have_count(2)
        assert page.locator("img").last.evaluate("image => image.naturalWidth") == 448
        page.screenshot(path=tmp_path / "good-page.png")
        picture.set_input_files(tmp_path / "cut.png")
        reason = page.get_by_text("cannot read cut.png (image file is truncated)")
        expect(reason).to_have_count(1)
        expect(reason).to_be_in_viewport()
        expect(page.get_by_text("Traceback")).to_have_count(0)
        page.screenshot(path=tmp_path / "bad-page.png")
        expect(bars).to_have_count(0)
        picture.set_input_files(tmp_path / "good.png")
        expect(bars).to_have_count(5)
        page.get_by_label("Remove Image").click()
        expect(bars).to_have_count(0)
        assert hosts - {None} == {"127.0.0.1"}  # data and blobs have none
        process.send_signal(signal.SIGINT)  # while the page is open
        _, error = process.communicate(timeout=30)
        assert (process.returncode, error.count("\n")) == (130, 1)
        chromium.close()


def write_bad(folder: Path) -> None:
    random_image(1, (64, 64)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1000])
    (folder / "text.png").write_text("hello")


@contextmanager
def demo(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command on a small network, as on a machine with a proxy: its address and process."""
    (folder / "run").mkdir()
    write_pretrained(folder / "run", new_network(**COLOURED))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_SHARE": "True",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }
    command = [sys.executable, "-m", "resnet_flax", "demo", str(folder / "run"), "--no-browser"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        assert line.endswith(" shows the page; Ctrl-C ends it\n"), line + process.stderr.read()
        yield line.split()[0], process
    finally:
        process.kill()
        process.communicate()
