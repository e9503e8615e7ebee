"""`sampler inspect prior`: what a learned prior says of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.inspect_shared import Out, finish, read_images
from sampler.cli.options import Debug, Json, ModelOptions, Quiet, takes_model_options
from sampler.cli.report import Report
from sampler.core.errors import UsageError


@takes_model_options(leave_out=("drop_encoders",))
def prior(
    network: Annotated[
        Path, typer.Argument(metavar="LPN", help="Folder of a learned proximal network (RUN/lpn).")
    ],
    images: Annotated[
        str, typer.Option(metavar="DIR", help="Images: run folder or folder of images.")
    ],
    limit: Annotated[int, typer.Option(min=1, help="Most images to read of a folder.")] = 100,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Print the value R(x) of a learned prior at images, encoded by the model; less is likelier.

    A gap that is not small belongs to an image outside the network's range, where R is infinite.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.cli.models import load_engine, model_config
        from sampler.models.proximal_files import load_proximal

        learned, engine = load_proximal(network), load_engine(model_config(model))
        found = read_images(images, engine.pipeline, limit, report)
        try:
            values = learned.prior(engine.pipeline.latents_of(found.pixels))
        except ValueError as error:
            raise UsageError(str(error)) from None
        numbers = zip(found.names, values.value.tolist(), values.gap.tolist(), strict=True)
        table = [{"image": name, "prior": value, "gap": gap} for name, value, gap in numbers]
        finish(report, out, "prior", table, {}, {"network": str(network)})
