"""The model over the paged cache, as a function of tensors: of the next tokens of rows, and of pieces of prompts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from advance_step.decode import cpu_attention
from advance_step.decode.cache import PagedKVCache
from advance_step.decode.compiled import Argument, compile_whole
from advance_step.decode.paged_kernels import PagedKernel
from advance_step.decode.passes import CorePass, DecodeStep, Prefill


class CompileError(ValueError):
    """A model cannot be compiled; the message says why."""


class Prompts(NamedTuple):
    """Pieces of several rows' prompts, packed one after the other."""

    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    slots: Tensor  # [tokens]
    tables: Tensor  # int32 [rows, pages]
    lengths: list[int]  # of each row, the tokens of its piece
    contexts: list[int]  # of each row, the tokens before them, which it has in its pages
    keep: Tensor  # [kept]: indices of tokens


class Forward(Protocol):
    """A model over a cache.

    Tokens, their positions and slots come in int64 of one shape, block tables as int32 [rows, pages].
    """

    cache: PagedKVCache
    attention: str  # by what
    gathers: bool  # whether a step costs every row what the tables are wide

    def step(self, tokens: Tensor, positions: Tensor, slots: Tensor, seq_lens: Tensor, tables: Tensor) -> Tensor:
        """What the model says after each of the next tokens of rows.

        tokens, positions, slots, seq_lens: [rows], or [rows, count]. Returns logits of that shape, and the vocabulary.
        """

    def prompts(self, prompts: Prompts) -> Tensor:
        """What the model says after the tokens to keep; returns logits [kept, vocabulary]."""


class TorchForward:
    """Attention in torch's operators, or by a kernel for steps."""

    def __init__(self, model: Any, cache: PagedKVCache, kernel: PagedKernel | None = None) -> None:
        self.model = model
        self.cache = cache
        self.kernel = kernel
        self.attention = kernel.name if kernel else "torch over gathered pages"
        self.gathers = kernel is None

    def step(self, tokens: Tensor, positions: Tensor, slots: Tensor, seq_lens: Tensor, tables: Tensor) -> Tensor:
        """As `Forward` says."""
        single = tokens.dim() == 1  # what kernels are for
        paged = DecodeStep(self.cache, slots, tables, positions, seq_lens, self.kernel if single else None)
        ids, at = (tokens[:, None], positions[:, None]) if single else (tokens, positions)
        logits = self.model(input_ids=ids, position_ids=at, use_cache=False, paged=paged).logits
        return logits[:, 0] if single else logits

    def prompts(self, prompts: Prompts) -> Tensor:
        """As `Forward` says."""
        tokens, positions, slots, tables, lengths, contexts, keep = prompts
        return _packed(self.model, tokens, positions, keep, Prefill(self.cache, slots, lengths, contexts, tables))


# What stands for any number of each while a model is compiled for a CPU: different from each other.
TOKENS, ROWS, COLUMNS, PAGES, KEPT = 29, 8, 53, 61, 17


class CoreForward:
    """Attention by the native core, on a CPU. Steps and prompts are the same function, which `compile` compiles."""

    attention, gathers = "the native core", False

    def __init__(self, model: Any, cache: PagedKVCache) -> None:
        self.model = model
        self.cache = cache
        self.compiled: Callable[..., Tensor] | None = None  # in the place of `logits`

    def step(self, tokens: Tensor, positions: Tensor, slots: Tensor, seq_lens: Tensor, tables: Tensor) -> Tensor:
        """As `Forward` says."""
        count = tokens.numel()
        starts = torch.arange(0, count + 1, count // len(tokens))
        packed = (tokens.reshape(-1), positions.reshape(-1), slots.reshape(-1))
        return self._call(*packed, tables, starts, torch.arange(count)).view(*tokens.shape, -1)

    def prompts(self, prompts: Prompts) -> Tensor:
        """As `Forward` says."""
        tokens, positions, slots, tables, lengths, _, keep = prompts
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return self._call(tokens, positions, slots, tables, starts, keep)

    def _call(self, *inputs: Tensor) -> Tensor:
        return (self.compiled or self.logits)(*(tensor.contiguous() for tensor in inputs))

    def logits(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, starts: Tensor, keep: Tensor
    ) -> Tensor:
        """Steps and prompts as one: row i's tokens are [starts[i], starts[i + 1])."""
        return _packed(self.model, tokens, positions, keep, CorePass(self.cache, slots, positions, tables, starts))

    def compile(self) -> None:
        """Compile the model for any number of tokens and rows.

        Raises CompileError for a model that cannot be traced whole.
        """
        model, layers = self.model, self.cache.layers
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}

        def function(*tensors: Tensor) -> Tensor:
            given = dict(zip(weights, tensors, strict=False))
            cache = replace(self.cache, layers=list(tensors[len(weights) :][: len(layers)]))
            return CoreForward(lambda **arguments: functional_call(model, given, (), arguments), cache).logits(
                *tensors[len(weights) + len(layers) :]
            )

        held = [Argument(weight, {}) for weight in weights.values()]
        held += [Argument(layer, {0: PAGES}) for layer in layers]
        of_tokens = Argument(torch.empty(TOKENS, dtype=torch.int64), {0: TOKENS})
        arguments = [
            *[of_tokens] * 3,
            Argument(torch.empty(ROWS, COLUMNS, dtype=torch.int32), {0: ROWS, 1: COLUMNS}),
            Argument(torch.empty(ROWS + 1, dtype=torch.int64), {0: ROWS + 1}),
            Argument(torch.empty(KEPT, dtype=torch.int64), {0: KEPT}),
        ]
        try:
            self.compiled = compile_whole(function, held, arguments)
        except Exception as error:  # of any kind: it is the model's own code that is traced
            raise CompileError(f"compile: {type(model).__name__} cannot be compiled whole: {error}") from error


def forward_of(model: Any, cache: PagedKVCache, kernel: PagedKernel | None = None) -> TorchForward | CoreForward:
    """By the native core where it serves the cache, else in torch's operators."""
    native = cpu_attention.serves(cache.device, cache.layers[0].dtype)
    return CoreForward(model, cache) if native else TorchForward(model, cache, kernel)


def _packed(model: Any, tokens: Tensor, positions: Tensor, keep: Tensor, paged: CorePass | Prefill) -> Tensor:
    """The model on tokens [tokens] as a batch of one; the logits after those to keep."""
    return model(
        input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, paged=paged
    ).logits[0]
