"""The page's server: on the loopback address, for browsers of this machine, without telemetry."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Read when gradio is imported: nothing is counted, nothing asked of another host.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sampler.errors import UsageError
from sampler.ui import style
from sampler.ui.page import Page
from sampler.ui.studio import Studio

HOST = "127.0.0.1"
# A page of another site that lets its own name point here is refused by the name it asks for.
_NAMES = [HOST, "localhost"]


@contextmanager
def served(studio: Studio, port: int, explain: Callable[[BaseException], str]) -> Iterator[str]:
    """The page, at the address that is yielded; port 0: any that is free.

    Raises SamplerError (2) for a port that is taken.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(studio.home)
    blocks = Page(studio, explain).blocks()
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
        raise UsageError(f"Port {port} is taken; name another with --port, or 0.") from None
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def free_port() -> int:
    """A port of the loopback address that nobody listens at."""
    import socket

    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]
