"""`sampler ui`: the playground, a page on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sampler.cli.options import Debug, Quiet
from sampler.cli.report import Report, explained, redacted

if TYPE_CHECKING:
    from collections.abc import Callable

    from sampler.config.schema import ModelConfig


def command(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 7860,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where runs are saved.")] = Path("runs"),
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: bundled.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model: a commit or tag.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Open a page to try samplers and guidance rules on; it is served to this machine only."""
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        import importlib.util

        from sampler.config.schema import checked
        from sampler.errors import UsageError

        if importlib.util.find_spec("gradio") is None:
            raise UsageError(
                "The playground needs the extra 'ui' (pip install diffusion-sampler[ui])."
            )
        given = {"path": model, "revision": revision, "device": device, "dtype": dtype}
        config = checked({"model": given}, {("model", k): f"--{k}" for k in given})
        _serve(config.model, port, out, report)


def _serve(model: ModelConfig, port: int, out: Path, report: Report) -> None:
    """Loads, serves, and waits until it is interrupted, which is how one leaves."""
    import tempfile

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
    """Until the user has enough."""
    import time

    while True:
        time.sleep(3600)


def explainer(report: Report) -> Callable[[BaseException], str]:
    """What turns an exception into the sentence that the command line would say."""

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
