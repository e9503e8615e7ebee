"""`sampler ui`: the playground, a local web page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sampler.cli.options import Debug, ModelOptions, Quiet, expanded, takes_model_options
from sampler.cli.report import Report, explained, redacted

if TYPE_CHECKING:
    from collections.abc import Callable

    from sampler.config.model import ModelConfig


@takes_model_options(leave_out=("drop_encoders",))
def command(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 7860,
    out: Annotated[
        Path, typer.Option("-o", "--out", callback=expanded, help="Folder for saved runs.")
    ] = Path("runs"),
    *,
    model: ModelOptions,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve the playground for samplers and guidance rules (localhost only)."""
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        import importlib.util

        from sampler.cli.models import model_config
        from sampler.core.errors import UsageError

        if importlib.util.find_spec("gradio") is None:
            raise UsageError(
                "The playground needs the extra 'ui': pip install 'diffusion-sampler[ui]'."
            )
        _serve(model_config(model), port, out, report)


def _serve(model: ModelConfig, port: int, out: Path, report: Report) -> None:
    """Load the model and serve the page until Ctrl-C."""
    import tempfile

    report.note("Loading the model ...")  # before the imports, which take most of the time
    from sampler.cli.models import load_engine
    from sampler.ui.server import served
    from sampler.ui.studio import Studio

    with tempfile.TemporaryDirectory(prefix="sampler-ui-", ignore_cleanup_errors=True) as home:
        studio = Studio(load_engine(model), model, out, Path(home))
        with served(studio, port, explainer(report)) as address:
            report.result(address)
            report.note(f"Runs are saved in {out}. Ctrl-C ends the playground.")
            try:
                _wait()
            except KeyboardInterrupt:
                report.note("The playground is closed.")


def _wait() -> None:
    """Sleep until interrupted."""
    import time

    while True:
        time.sleep(3600)


def explainer(report: Report) -> Callable[[BaseException], str]:
    """A function that turns an exception into the command line's sentence about it."""

    def explain(error: BaseException) -> str:
        if report.debug:
            import sys
            import traceback

            print(
                redacted("".join(traceback.format_exception(None, error, error.__traceback__))),
                file=sys.stderr,
            )
        return redacted(explained(error)[0])

    return explain
