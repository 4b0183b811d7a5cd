"""The main job: prompts to texts, each kept as soon as it is finished."""

from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

from advance_step._backends import check_device
from advance_step.generate.fingerprint import model_fingerprint
from advance_step.generate.inputs import check_not_the_same, from_arguments, open_input
from advance_step.generate.interrupts import exit_code
from advance_step.generate.model import find_model
from advance_step.generate.outputs import open_output
from advance_step.generate.run import Run
from advance_step.generate.run_header import RunHeader
from advance_step.generate.screen import say
from advance_step.generate.settings import Settings

if TYPE_CHECKING:
    from advance_step.generate.report.report import Report


def generate(
    texts: list[str],
    input: str | None,
    output: str | None,
    resume: bool,
    settings: Settings,
    report: str | None = None,
) -> int:
    """Decode `texts`, or the prompts of `input`, to the screen or to `output`; a page of how it went to `report`.

    Returns the exit code: 0; 1 where a line failed or was not verified; 130 or 143 where interrupted or terminated
    (what is finished is kept). Raises ValueError or OSError for bad input before anything is decoded, and OSError
    where a result cannot be written.
    """
    if bool(texts) == bool(input):
        got = "both" if texts else "neither"
        raise ValueError(f"expected prompts or --input, got {got}")
    if resume and not output:
        raise ValueError("--resume: expected an --output to go on with, got none")
    if settings.ray:
        _check_for_ray(output, report, settings)
    else:
        check_device(settings.device)
    if input and output:
        check_not_the_same(input, output)
    source = open_input(input, settings.raw) if input else from_arguments(texts, settings.raw)
    page = _open_report(report, [input, output, output and f"{output}.run.json"], settings) if report else None
    with ExitStack() as stack:
        out = None
        if output:
            model = find_model(settings.model)
            header = RunHeader(source.name, source.fingerprint, str(model), model_fingerprint(model), settings.deciding)
            out = stack.enter_context(open_output(output, header, resume))
        run = Run(source, out, settings, page)
        kept = f"kept in {output} (--resume goes on from there)" if out and out.size is not None else "written"
        of = f" of {source.total}" if source.total else ""
        try:
            with page.of(run) if page else nullcontext():
                return run.run()
        except KeyboardInterrupt as interrupt:
            say(f"interrupted: {run.finished}{of} prompts are finished and {kept}")
            return exit_code(interrupt)
        except OSError:
            if out and run.finished:
                say(f"{run.finished}{of} prompts are finished and {kept}")
            raise


def _check_for_ray(output: str | None, report: str | None, settings: Settings) -> None:
    """ValueError for options that do not go with --ray."""
    if not output:
        raise ValueError("--ray: expected an --output, got none")
    if report:
        raise ValueError(f"--report: expected none with --ray, whose workers are not drawn, got {report}")
    if ":" in settings.device:
        raise ValueError(
            f"--device: expected cpu or cuda with --ray, which deals out GPUs itself, got {settings.device}"
        )


def _open_report(path: str, files: list[str | None], settings: Settings) -> "Report":
    """The report, judged and tried out; what draws it is imported only where one is asked for."""
    try:
        from advance_step.generate.report.report import Report
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("matplotlib", "jinja2"):
            raise
        raise ValueError(f'--report: {missing} is not installed: pip install "advance-step[report]"') from error
    return Report(path, [file for file in files if file], find_model(settings.model), settings)
