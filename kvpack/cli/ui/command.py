"""`kvpack ui`: a page in the browser on which a video is watched and changed while it is made."""

from pathlib import Path
from typing import Annotated

import typer

from kvpack.errors import InvalidOptionError


def ui(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pipeline.", show_default="the tiny one that comes with kvpack")
    ] = None,
    device: Annotated[str | None, typer.Option(help="E.g. cpu or cuda.", show_default="cuda if there is one")] = None,
    saved: Annotated[Path, typer.Option(help="Folder of saved videos.")] = Path("kvpack-videos"),
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes the first that is free.")] = 7860,
) -> None:
    r"""Open a page on which a video grows while you watch it, and change its prompt meanwhile.

    Needs Gradio: pip install "kvpack\[ui]". Ctrl-C ends it. Nobody is asked for a password.
    """
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported; nothing calls home
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # visitors name models and memories; none is fetched for them
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InvalidOptionError('the page needs Gradio; pip install "kvpack[ui]"') from error
    import torch

    from kvpack.cli.ui.model import Model
    from kvpack.cli.ui.page import opened

    if model is None:
        torch.set_num_threads(1)  # tensors as small as the tiny model's are slower on several
    page, address = opened(Model(model, device), saved, server_name=host, server_port=port or None)
    typer.echo(f"open {address} in a browser; Ctrl-C ends it")
    page.block_thread()
