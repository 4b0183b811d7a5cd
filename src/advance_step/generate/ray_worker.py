"""What a worker of a job on Ray does, in a process of its own: load the model once, then decode blocks of lines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from advance_step.generate.engine import make_decoder
from advance_step.generate.inputs import Input
from advance_step.generate.model import load_model
from advance_step.generate.outputs import Output
from advance_step.generate.records import BadLine, Prompt
from advance_step.generate.requests import RequestMaker
from advance_step.generate.run import Run, opening
from advance_step.generate.settings import DTYPES, Settings


@dataclass
class BlockResult:
    """What a worker makes of a block: a result for each line, in the order of the lines."""

    entries: list[dict[str, Any]]
    first_failed: BadLine | None
    tokens: int


class BlockOutput(Output):
    """The output of one block, in memory."""

    def __init__(self) -> None:
        super().__init__("a block", -1)
        self.entries: list[dict[str, Any]] = []

    def write(self, entry: dict[str, Any]) -> None:
        """Keep a line."""
        self.entries.append(entry)


class Worker:
    """A model and its decoder: what Ray makes an actor of."""

    def start(self, settings: Settings, path: str | None) -> list[str]:
        """Load the model; what a run says at its beginning. ValueError or OSError for a model that cannot be decoded.

        path: where the model lies, from wherever this process stands; the results name it as the settings do.
        """
        disable_progress_bar()
        self.settings = settings
        self.model, self.tokenizer = load_model(path, DTYPES[settings.dtype], print, settings.device)
        if settings.model and self.model.config.name_or_path == path:
            self.model.config.name_or_path = str(Path(settings.model))
        self.maker = RequestMaker(self.model, self.tokenizer, settings)
        self.decoder = make_decoder(self.model, self.tokenizer, settings, None)
        return opening(self.model, self.decoder, settings)

    def decode(self, block: list[Prompt | BadLine]) -> BlockResult:
        """The results of the block's lines."""
        out = BlockOutput()
        run = Run(Input("a block", iter(block), "", len(block)), out, self.settings)
        before = self.decoder.figures.tokens
        for done in self.decoder.run(run.requests(iter(block), self.decoder, self.maker)):
            for request in done:
                run.finish(request, self.model, self.tokenizer)
        return BlockResult(out.entries, run.first_failed, self.decoder.figures.tokens - before)
