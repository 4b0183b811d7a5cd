"""A function of tensors compiled for the CPU by torch's inductor, for sizes that vary, without torch.compile's guards.

The function is traced once, whole, on tensors without values, and the graph is handed to the compiler, which keeps what
it makes of it on disk (where TORCHINDUCTOR_CACHE_DIR says). Nothing in the graph depends on how many rows, pages or
columns there are, so that a machine compiles a model once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._inductor import standalone_compile
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

Function = Callable[..., Tensor]


class Argument(NamedTuple):
    """A tensor that the function takes, as an example, and the sizes of it that vary from two on.

    varies: by dimension, the size that stands for all others while compiling; dimensions with the same one vary
        together.
    """

    tensor: Tensor
    varies: dict[int, int]


def compile_whole(function: Function, held: Sequence[Argument], inputs: Sequence[Argument]) -> Function:
    """`function(*held, *inputs)` compiled; returns it as a function of the inputs.

    held: tensors that are the same in all calls, by their address (weights, pages).
    Raises whatever torch does for a function that waits for values, and cannot be traced whole.
    """
    fake = FakeTensorMode(shape_env=ShapeEnv())
    with torch.inference_mode(False), torch.no_grad():
        examples = [_example(argument, fake) for argument in [*held, *inputs]]
        with fake:
            graph = make_fx(lambda *tensors: (function(*tensors),))(*examples)
        compiled = standalone_compile(graph, list(examples), dynamic_shapes="from_graph")
    kept = [argument.tensor for argument in held]
    return lambda *inputs: compiled(*kept, *inputs)[0]


def _example(argument: Argument, fake: FakeTensorMode) -> Tensor:
    """The argument without its values, its varying sizes symbols."""
    tensor, varies = argument
    if not varies:
        return fake.from_tensor(tensor, static_shapes=True)
    sizes = [varies.get(d, size) for d, size in enumerate(tensor.shape)]
    kinds = [DimDynamic.DUCK if d in varies else DimDynamic.STATIC for d in range(tensor.dim())]
    return fake.from_tensor(
        torch.empty(sizes, dtype=tensor.dtype), symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)
    )
