"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

DTYPES = ("bfloat16", "float16", "float32")

Seconds = Annotated[float, typer.Option(help="Length of the video.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Options = Annotated[
    list[str],
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the stack, see 'kvpack policies STACK'."),
]
StackName = Annotated[
    str | None,
    typer.Option(
        "--stack",
        help="Memory; see 'kvpack policies' for what is installed.",
        show_default="the model's own in its kvpack_config.json, else packforcing",
    ),
]
Model = Annotated[Path, typer.Option(help="Folder of a diffusers pipeline, or its Hub id.")]
Height = Annotated[int | None, typer.Option(help="Pixels; the model's own, else the pipeline's.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's own, else the pipeline's.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's own")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps of a chunk.", show_default="the model's own, else the pipeline's"),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="1 is no guidance.", show_default="the model's own, else the pipeline's")
]
NegativePrompt = Annotated[str | None, typer.Option(help="What it does not show; needs guidance.")]
Dtype = Annotated[str | None, typer.Option(help=", ".join(DTYPES), show_default="float32 on cpu, else bfloat16")]
Device = Annotated[str | None, typer.Option(help="E.g. cpu or cuda.", show_default="cuda if there is one")]
Call = Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Further argument of the pipeline's call.")]
