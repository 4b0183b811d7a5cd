"""The commands of `advance-step`: each parses, calls the room that does the work, and prints."""

import os
import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# Groups of options in --help.
FILES, MODEL, TEXT, BATCH, CHECKS = "Files", "Model", "Text", "Batch", "Checks and reports"
BY_MODEL = "as the model's generation_config; greedy"


@app.callback()
def main() -> None:
    """The decode step of a paged KV cache, in place: decode with it, check implementations of it."""


@app.command()
def info() -> None:
    """Versions, which executor serves each device, and why, and whether vLLM runs on them."""
    from advance_step._backends import describe
    from advance_step.plugins import vllm

    print(describe(), vllm.describe(), sep="\n")


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; --input takes a file of them.", show_default=False)
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(
            help='A file, also .gz, or - for stdin; a line is {"prompt": ...} or {"messages": ...}, one of '
            "the OpenAI batch format, or in a .txt file a prompt.",
            rich_help_panel=FILES,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Write each result here, as a JSON line; - for stdout.", rich_help_panel=FILES)
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with an --output that exists, and skip what it has.", rich_help_panel=FILES)
    ] = False,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write results in the order of the input.", rich_help_panel=FILES)
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="A transformers directory or a .gguf file.",
            show_default="SmolLM2-135M-Instruct",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to decode: cpu, cuda, cuda:1.", rich_help_panel=MODEL)] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MODEL)] = "bfloat16",
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the model: about a minute the first time, ten seconds from then on.",
            show_default="on a CPU, for a job of 5,000 steps or more",
            rich_help_panel=MODEL,
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not put prompts into the model's chat template.", rich_help_panel=TEXT)
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to decode for each prompt, at most.", rich_help_panel=TEXT)
    ] = 128,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens before which a text does not end.", rich_help_panel=TEXT)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="How far draws go beyond the likeliest token; 0 takes it always.",
            show_default=BY_MODEL,
            rich_help_panel=TEXT,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens of this probability together.",
            show_default=BY_MODEL,
            rich_help_panel=TEXT,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from so many of the likeliest tokens.", show_default=BY_MODEL, rich_help_panel=TEXT),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from tokens of at least this share of the likeliest's probability.",
            show_default=BY_MODEL,
            rich_help_panel=TEXT,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="How much less likely tokens of the text so far become; 1 changes nothing.",
            show_default=BY_MODEL,
            rich_help_panel=TEXT,
        ),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(help="What a token loses that was generated before, -2 to 2.", rich_help_panel=TEXT),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(help="What a token loses for each time that it was generated, -2 to 2.", rich_help_panel=TEXT),
    ] = None,
    seed: Annotated[int, typer.Option(help="Each line draws by it and its number.", rich_help_panel=TEXT)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a result; may be repeated.", rich_help_panel=TEXT)
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="Log-probabilities of each token and of so many likeliest.", rich_help_panel=TEXT),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end of a text.", rich_help_panel=TEXT)
    ] = False,
    json_schema: Annotated[
        str | None, typer.Option(help="A file with a JSON schema, which every text then follows.", rich_help_panel=TEXT)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts that are decoded together.", rich_help_panel=BATCH)
    ] = 8,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in a page of the KV cache.",
            show_default="16; 256 where a kernel asks for it",
            rich_help_panel=BATCH,
        ),
    ] = None,
    num_pages: Annotated[
        int | None,
        typer.Option(min=1, help="Pages of the KV cache.", show_default="what the rows need", rich_help_panel=BATCH),
    ] = None,
    steps_per_sync: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between two looks of the host at the rows.",
            show_default="1; 8 on a GPU",
            rich_help_panel=BATCH,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of a prefill pass, at most.", rich_help_panel=BATCH)
    ] = 4096,
    draft_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens guessed from the text so far and verified in a step.", rich_help_panel=BATCH),
    ] = 0,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Decode on a Ray cluster, RAY_ADDRESS or a local one; see docs/scale.md.",
            rich_help_panel=BATCH,
        ),
    ] = False,
    ray_cores: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cores of a worker of --ray on CPUs.",
            show_default="4, or what a machine has",
            rich_help_panel=BATCH,
        ),
    ] = None,
    verify: Annotated[
        int,
        typer.Option(
            min=0, help="Compare so many prompts with transformers' generate, in float32.", rich_help_panel=CHECKS
        ),
    ] = 0,
    report: Annotated[
        str | None,
        typer.Option(
            help="Write a page of charts (.html) here: rates, rows, pages, latencies.", rich_help_panel=CHECKS
        ),
    ] = None,
) -> None:
    """Decode prompts with a Hugging Face causal LM over a paged KV cache.

    Exit code: 0; 1 if a line failed or was not verified; 2 for bad options; 130 after Ctrl-C, 143 after SIGTERM.
    """
    from advance_step.generate.interrupts import BROKEN_PIPE, exit_code, terminable

    try:
        with terminable():
            try:
                from advance_step.generate import job
                from advance_step.generate.settings import Settings, read_schema
            except ModuleNotFoundError as error:
                missing = (error.name or "").split(".")[0]
                if missing not in ("transformers", "rich"):
                    raise
                sys.exit(f'advance-step generate: {missing} is not installed: pip install "advance-step[models]"')
            sampling = {
                "max_new_tokens": max_new_tokens,
                "min_new_tokens": min_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "seed": seed,
                "stop": stop or None,
                "logprobs": logprobs,
                "ignore_eos": ignore_eos or None,
            }
            settings = Settings(
                model=model,
                device=device,
                dtype=dtype,
                raw=raw,
                sampling={name: value for name, value in sampling.items() if value is not None},
                batch_size=batch_size,
                block_size=block_size,
                num_pages=num_pages,
                steps_per_sync=steps_per_sync,
                max_num_batched_tokens=max_num_batched_tokens,
                draft_tokens=draft_tokens,
                compile=compile,
                ordered=ordered,
                verify=verify,
                json_schema=read_schema(json_schema) if json_schema else None,
                ray=ray,
                ray_cores=ray_cores,
            )
            code = job.generate(prompts or [], input, output, resume, settings, report)
    except BrokenPipeError:  # nobody reads any more; and nothing is to be flushed to them at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except (ValueError, OSError) as error:
        sys.exit(f"advance-step generate: {error}")
    except KeyboardInterrupt as interrupt:
        code = exit_code(interrupt)
    sys.exit(code)


@app.command()
def conformance(
    target: Annotated[
        str | None, typer.Option(help="package.module:function to hold to --contract.", show_default="our executors")
    ] = None,
    contract: Annotated[
        str | None, typer.Option(help="npu, vllm, flashinfer, eagle, until-stop or slot-mapping.", show_default="all")
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
