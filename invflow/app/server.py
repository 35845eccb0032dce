"""Server of the app, by default only for this machine."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["LIMIT", "launch", "serve"]

#: largest size of an uploaded file
LIMIT = "20mb"
_MISSING = "invflow app needs gradio 6 or later: pip install 'invflow[app]', or pip install 'gradio>=6'"


def launch(host: str = "127.0.0.1", port: int | None = None) -> tuple[Any, str]:
    """Start the app in threads of this process.

    The page loads nothing from other servers and sends nothing to them: no analytics, no shared link, fonts
    of the system. Uploaded files stay in a temporary folder and are deleted after an hour.

    Args:
        host: Address to listen on; 127.0.0.1 is reachable only from this machine.
        port: Port to listen on; None for the first free one from 7860 on.

    Returns:
        The Blocks, whose ``close()`` stops the app, and the address of the page.

    Raises:
        ValueError: If gradio is not installed.
        OSError: If the port is in use.
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
    """Serve the app until Ctrl-C, then delete uploaded files.

    Args:
        host: Address to listen on.
        port: Port to listen on; None for the first free one from 7860 on.
        say: Function called with the address once the app is ready.
    """
    with tempfile.TemporaryDirectory(prefix="invflow-app-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        blocks, address = launch(host, port)
        say(f"the app is at {address} - press Ctrl-C to stop it")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # same as Ctrl-C: the folder is deleted
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("stopped")
        finally:
            blocks.close(verbose=False)
