"""Serving the app on this machine, and to nobody else unless asked."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["LIMIT", "launch", "serve"]

#: of an uploaded file
LIMIT = "20mb"
_MISSING = "invflow app needs gradio 6 or later: pip install 'invflow[app]', or pip install 'gradio>=6'"


def launch(host: str = "127.0.0.1", port: int | None = None) -> tuple[Any, str]:
    """Start the app in threads of this process.

    Nothing that it shows comes from elsewhere, and nothing is sent elsewhere: no analytics, no shared link, the fonts
    of the system. Files of users lie in a temporary folder until they are an hour old.

    Args:
        host: the address that is listened on; 127.0.0.1 can be reached from this machine alone.
        port: None for the first that is free from 7860 on.

    Returns:
        The Blocks, whose ``close()`` ends it, and the address of the page.

    Raises:
        ValueError: without gradio.
        OSError: for a port that is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError(_MISSING) from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ValueError(f"gradio {gradio.__version__} is installed, but {_MISSING}")
    from invflow.app.layout import STYLE, build

    blocks = build().queue(default_concurrency_limit=8, max_size=64)
    fonts = [gradio.themes.Font("system-ui"), gradio.themes.Font("sans-serif")]
    fixed = [gradio.themes.Font("ui-monospace"), gradio.themes.Font("monospace")]
    theme = gradio.themes.Base(font=fonts, font_mono=fixed)
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, max_file_size=LIMIT,
        footer_links=[], ssr_mode=False, enable_monitoring=False, run_history=False, mcp_server=False, pwa=False,
        theme=theme, css=STYLE)
    return blocks, address


def serve(host: str = "127.0.0.1", port: int | None = None, say: Callable[[str], None] = print) -> None:
    """Serve the app until Ctrl-C; what users uploaded is then removed.

    Args:
        host: the address that is listened on.
        port: None for the first that is free from 7860 on.
        say: called with the address once it answers.
    """
    with tempfile.TemporaryDirectory(prefix="invflow-app-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        blocks, address = launch(host, port)
        say(f"the app is at {address} - Ctrl-C ends it")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does: the folder is removed
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("ended")
        finally:
            blocks.close(verbose=False)
