"""``invflow app``: mask a part of a picture in the browser and see possible completions."""

from __future__ import annotations

from typing import Annotated

import typer

from invflow.cli.options import say

__all__ = ["app"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def app(
    host: Annotated[str, typer.Option(help="Address to listen on; the default is only reachable from this machine.")]
    = "127.0.0.1",
    port: Annotated[int | None, typer.Option(
        min=1, max=65535, help="Port to listen on [default: the first free one from 7860].")] = None,
) -> None:
    """Serve the app: paint, restore, compare, certify, in a browser.

    Nothing leaves this machine. Needs gradio: pip install 'invflow[app]'.
    """
    from invflow.app.server import serve

    if host not in _LOOPBACK:
        say(f"anyone who can reach {host} can use the app, and with it the processors of this machine")
    serve(host, port, typer.echo)
