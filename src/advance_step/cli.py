"""The commands of `advance-step`: each parses, calls the room that does the work, and prints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """The decode step of a paged KV cache, in place: decode with it, check implementations of it."""


@app.command()
def info() -> None:
    """Versions, and which executor serves each device, and why."""
    from advance_step._backends import describe

    print(describe())


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; or give --input.", show_default=False)] = None,
    input: Annotated[
        Path | None, typer.Option(help='A prompt a line (.txt), or {"prompt": ..., "id": ...} (.jsonl).')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write each finished prompt here, as a JSON line.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an --output that exists: skip what it has.")] = False,
    model: Annotated[
        str | None, typer.Option(help="A transformers directory or a .gguf file.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to decode: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for each prompt, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are decoded together.")] = 8,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens in a page of the KV cache.", show_default="16; 256 where a kernel asks for it"
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between two looks of the host at the rows.", show_default="1; 8 on a GPU"),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put prompts into the model's chat template.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step: a minute or two, then faster.")
    ] = False,
    verify: Annotated[
        int, typer.Option(min=0, help="Compare that many prompts with transformers' generate, in float32.")
    ] = 0,
) -> None:
    """Decode prompts, greedily, with a Hugging Face causal LM over a paged KV cache."""
    try:
        from advance_step.generate import job
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("transformers", "rich"):
            raise
        sys.exit(f'advance-step generate: {missing} is not installed: pip install "advance-step[models]"')
    settings = job.Settings(model, device, dtype, max_new_tokens, batch_size, block_size, window, raw, compile, verify)
    try:
        code = job.generate(prompts or [], input, output, resume, settings)
    except (ValueError, OSError) as error:
        sys.exit(f"advance-step generate: {error}")
    sys.exit(code)


@app.command()
def conformance(
    target: Annotated[
        str | None, typer.Option(help="package.module:function to hold to --contract.", show_default="our executors")
    ] = None,
    contract: Annotated[
        str | None, typer.Option(help="npu, vllm, flashinfer, eagle or until-stop.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the tensors are.")] = "cpu",
    skip: Annotated[list[str] | None, typer.Option(help="A clause that the target lacks by design.")] = None,
    format: Annotated[str, typer.Option(help="table, json or markdown.")] = "table",
    timeout: Annotated[float, typer.Option(help="Seconds after which a clause without an answer fails.")] = 300,
) -> None:
    """Hold a function to a contract, clause by clause; without --target, our own executors on this machine."""
    from advance_step.conformance import report

    try:
        code = report.conformance(target, contract, device, skip or [], format, timeout)
    except ValueError as error:
        sys.exit(f"advance-step conformance: {error}")
    sys.exit(code)


@app.command(
    "emulate-npu",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def emulate_npu(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python script, or -m MODULE, or -c CODE.", metavar="SCRIPT")],
) -> None:
    """Run an unmodified Ascend script on a machine without an NPU; what follows SCRIPT is the script's."""
    from advance_step.ascend.script import run

    sys.exit(run(script, context.args))
