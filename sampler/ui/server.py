"""Server of the page: loopback address only, no telemetry."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Read when gradio is imported: no analytics, no request to another host.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sampler.core.errors import UsageError
from sampler.ui import style
from sampler.ui.page import page
from sampler.ui.studio import Studio

HOST = "127.0.0.1"
# Refuses DNS rebinding: requests that reach this address under another host name.
_NAMES = [HOST, "localhost"]


@contextmanager
def served(studio: Studio, port: int, explain: Callable[[BaseException], str]) -> Iterator[str]:
    """Serve the page; yields its address. port: 0 takes a free one.

    Raises UsageError if the port is in use.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(studio.home)
    blocks = page(studio, explain)
    try:
        _, address, _ = blocks.queue(api_open=False).launch(
            server_name=HOST,
            server_port=port or free_port(),
            allowed_paths=[str(studio.home)],
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES)]},
            theme=style.theme(),
            css=style.CSS,
            footer_links=[],
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            enable_monitoring=False,
        )
    except OSError:
        raise UsageError(f"Port {port} is in use; choose another with --port, or 0.") from None
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def free_port() -> int:
    """A free port of the loopback address."""
    import socket

    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]
