"""The main job: prompts to texts, each kept as soon as it is finished."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from advance_step import check_device
from advance_step.decode import Decoder, Request
from advance_step.generate.model import load_model, stop_token_ids
from advance_step.generate.prompts import Prompt, kept, read_prompts, to_request, write_result
from advance_step.generate.screen import progress_bar, progress_line, say, summary, text_stream
from advance_step.generate.verify import differing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Settings:
    """How to decode; each field is the option of `advance-step generate` of that name."""

    model: str | None
    device: str
    dtype: str
    max_new_tokens: int
    batch_size: int
    block_size: int | None
    window: int | None
    raw: bool
    compile: bool
    verify: int


def generate(texts: list[str], input: Path | None, output: Path | None, resume: bool, settings: Settings) -> int:
    """Decode `texts`, or the prompts of the file `input`, to the screen or to the file `output`.

    Returns the exit code: 0; 1 where a prompt was not verified; 130 where interrupted (what is finished is kept).
    Raises ValueError or OSError for bad input before anything is decoded.
    """
    if bool(texts) == bool(input):
        raise ValueError(
            "expected prompts or --input, got both" if texts else "expected prompts or --input, got neither"
        )
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {settings.dtype}")
    check_device(settings.device)
    prompts = read_prompts(input) if input else [Prompt(number, text) for number, text in enumerate(texts, 1)]
    if output:
        prompts = _unfinished(prompts, output, resume)
        if not prompts:
            say(f"{output} has every prompt already")
            return 0
    disable_progress_bar()  # transformers' own
    model, tokenizer = load_model(settings.model, DTYPES[settings.dtype], say, settings.device)
    context = model.config.get_text_config().max_position_embeddings
    requests = [to_request(tokenizer, prompt, settings.raw, settings.max_new_tokens, context) for prompt in prompts]
    decoder = decoder_for(model, requests, settings)
    if decoder.captured:
        say(f"on {settings.device}: steps captured in CUDA graphs, attention by {decoder.attention}")
    finished: list[Request] = []
    try:
        _decode(decoder, prompts, requests, tokenizer, output, finished)
    except KeyboardInterrupt:
        where = f"kept in {output} (--resume goes on from there)" if output else "printed"
        say(f"interrupted: {len(finished)} of {len(requests)} prompts are finished and {where}")
        return 130
    say(summary(decoder.figures, len(requests)))
    return 0 if settings.verify == 0 else _verified(requests[: settings.verify], model, settings)


def decoder_for(model: Any, requests: list[Request], settings: Settings) -> Decoder:
    """A decoder with rows and pages for these requests, and no more."""
    return Decoder.for_requests(
        model,
        requests,
        batch_size=settings.batch_size,
        block_size=settings.block_size,
        stop_token_ids=stop_token_ids(model),
        steps_per_sync=settings.window or (8 if model.device.type == "cuda" else 1),
        compile=settings.compile,
    )


def _unfinished(prompts: list[Prompt], output: Path, resume: bool) -> list[Prompt]:
    """The prompts that `output` does not have. ValueError where it has something that is not theirs."""
    if output.exists() and output.stat().st_size and not resume:
        raise ValueError(f"--output: expected a new file, got {output}, which exists (--resume goes on with it)")
    finished = kept(output)
    for prompt in prompts:
        if finished.get(prompt.id, prompt.text) != prompt.text:
            raise ValueError(f"--resume: {output} has another prompt under id {prompt.id!r}")
    return [prompt for prompt in prompts if prompt.id not in finished]


def _decode(
    decoder: Decoder,
    prompts: list[Prompt],
    requests: list[Request],
    tokenizer: Any,
    output: Path | None,
    finished: list[Request],
) -> None:
    """Run the requests and hand out each text: as it grows if it is the only one, otherwise when it is finished.

    A request joins `finished` when its text is out.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    with ExitStack() as stack:
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            lines = stack.enter_context(output.open("a", encoding="utf-8"))
        alone = len(requests) == 1 and not output
        stream = text_stream(tokenizer, lambda text: print(text, end="", flush=True))
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("", total=len(requests), visible=not alone)
        for done in decoder.run(requests):
            if alone:
                stream(requests[0])
            for request in done:
                prompt, text = by_id[request.id], tokenizer.decode(request.tokens, skip_special_tokens=True)
                if output:
                    write_result(lines, prompt, request, text)
                else:
                    print("" if alone else f"[{prompt.id}] {prompt.text}\n{text.strip()}\n", flush=True)
                finished.append(request)
            bar.update(task, completed=len(finished), description=progress_line(decoder))


def _verified(requests: list[Request], model: Any, settings: Settings) -> int:
    """Say whether transformers' `generate` gives the same; in float32, where equality is to be expected."""
    if settings.dtype != "float32":
        model, _ = load_model(settings.model, torch.float32, say, settings.device)
        requests = [Request(request.id, request.prompt_ids, request.sampling) for request in requests]
        for _ in decoder_for(model, requests, replace(settings, compile=False)).run(requests):
            pass
    wrong = differing(model, requests)
    for request in wrong:
        say(f"NOT verified: prompt {request.id!r} differs from transformers' generate (greedy, float32)")
    if not wrong:
        say(
            f"verified: {len(requests)} of {len(requests)} as transformers' generate, token for token (greedy, float32)"
        )
    return 1 if wrong else 0
