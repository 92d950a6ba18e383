"""A page that shows what a network makes of a picture, for this machine alone: `demo_page`.

It needs the extra ``demo``.
"""

import dataclasses
import logging
import os
import socket
import threading
import webbrowser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from resnet_flax.errors import InputError, reason
from resnet_flax.inference.predict import classify, compute_logits, read_images
from resnet_flax.inference.pretrained import Network

try:
    import fastapi
    import gradio
    import uvicorn
except ImportError as error:
    mend = "install it by pip install 'resnet_flax[demo]'"
    raise InputError(f"the page needs Gradio, which is not here: {mend}") from error

HOST = "127.0.0.1"
BARS = 5
SEEN_SIDE = 448  # pixels, to which what the network saw is enlarged
KEPT_SECONDS = 86_400  # pictures, and none once the page is closed
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}

logger = logging.getLogger(__name__)


def demo_page(network: Network, variables: Any, title: str = "resnet_flax") -> gradio.Blocks:
    """A page that takes a picture, and shows the likeliest classes and what the network saw.

    Raises:
        InputError: when the network's weights are damaged, or when it takes no pictures.
    """
    classify(network, variables, [])
    # Compiled here, for every picture to come.
    compute_logits(network, variables, np.zeros((1, *network.image_shape), np.uint8))
    plain = dataclasses.replace(network, normalization=None)
    side = network.image_size
    caption = f"What the network saw: {side}x{side} pixels"

    def show(picture: str | None) -> Iterator[tuple[Any, Any]]:
        nothing = None, gradio.update(value=None, label=caption)
        if picture is None:
            yield nothing
            return
        try:
            (prediction,) = classify(network, variables, [picture], BARS)
            pixels = np.asarray(read_images(plain, [picture])[0])
        except InputError as error:
            yield nothing  # in the place of the last picture's
            why = str(error).replace(f"{Path(picture).parent}{os.sep}", "")
            raise gradio.Error(why, duration=None, print_exception=False) from error
        bars: dict[str, float] = {}
        for name, share in prediction.top:  # classes may share a name
            bars[f"{name} ({len(bars) + 1})" if name in bars else name] = share
        times = max(1, SEEN_SIDE // side)
        seen = np.rint(pixels * 255).astype(np.uint8).repeat(times, 0).repeat(times, 1)
        inverted = ", inverted: light background" if prediction.inverted else ""
        yield bars, gradio.update(value=seen.squeeze(), label=caption + inverted)

    with gradio.Blocks(
        title=title, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gradio.Markdown(f"{len(network.classes)} classes: drop a picture, PNG or JPEG.")
        with gradio.Row():
            picture = gradio.Image(
                type="filepath",
                label="Picture",
                sources=["upload", "clipboard"],
                buttons=[],
                height=SEEN_SIDE,
            )
            bars = gradio.Label(label="Likeliest classes", num_top_classes=BARS)
            seen = gradio.Image(
                label=caption, format="png", interactive=False, buttons=[], height=SEEN_SIDE
            )
        # Gradio's own would decode the file: other pixels, and bad ones without a reason.
        picture.preprocess = lambda payload: payload and payload.path
        changes = [picture.upload, picture.clear]  # `picture.change` comes twice
        gradio.on(changes, show, picture, [bars, seen], api_name="predict")
    return page


def serve(page: gradio.Blocks, port: int = 0, *, in_browser: bool = False) -> None:
    """Serves a page to this machine until a signal ends it, and logs its address.

    Args:
        page: as of `demo_page`.
        port: 0 for a free one.
        in_browser: whether to open it in the user's browser.

    Raises:
        InputError: when the port cannot be used.
    """
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise InputError(f"port {port} cannot be used ({reason(error)}): choose another") from error
    # `page.launch` would first ask a proxy for it, where one is set, and obey Gradio's variables.
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=HOST,
        server_port=listener.getsockname()[1],
        footer_links=[],
        theme=gradio.themes.Default(**SYSTEM_FONTS),
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    address = "http://{}:{}".format(*listener.getsockname())
    logger.info("%s shows the page; Ctrl-C ends it", address)
    if in_browser:  # one in a terminal does not return
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with ThreadPoolExecutor(1) as pool:  # in the main thread it would take signals, and repeat them
        serving = pool.submit(server.run, [listener])
        try:
            serving.result()
        finally:
            server.should_exit = True
