"""Runs Ascend code on a machine without an NPU: a device "npu" in CPU memory, and a module that answers `torch_npu`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import NoReturn

import torch

import advance_step

OPERATORS = ("npu_advance_step_flashattn",)


class TorchNpu(types.ModuleType):
    """What `import torch_npu` gives while the NPU is emulated."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"torch_npu.{name} is not emulated; advance_step emulates torch_npu.npu and the operators "
            f"{', '.join(f'torch_npu.{ours}' for ours in OPERATORS)}"
        )


def enable() -> None:
    """Add the device "npu" (npu:0, in CPU memory), `torch.npu`, `torch_npu` and `torch.ops.npu` to this process.

    Idempotent, and for the life of the process: torch has no way to take a device away again.
    An operator of ours on "npu" tensors runs on the CPU, and refuses bad values in tensors as it does there
    (an NPU gives such a row slot -1): this is where one looks for mistakes.

    Raises:
        RuntimeError: torch_npu is installed, another device has torch's PrivateUse1, or this torch is too old.

    >>> import subprocess, sys
    >>> code = "from advance_step.ascend import emulation; emulation.enable(); import torch; print(torch.ones(2).npu())"
    >>> subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    "tensor([1., 1.], device='npu:0')\\n"
    """
    if isinstance(sys.modules.get("torch_npu"), TorchNpu):
        return
    if (real := importlib.util.find_spec("torch_npu")) is not None:
        raise RuntimeError(
            f"torch_npu is installed ({real.origin}), so its device is not emulated: run the script itself. "
            "To put our operators in the place of torch_npu's, see advance_step.ascend.torch_npu.patch"
        )
    if (taken := torch._C._get_privateuse1_backend_name()) != "privateuseone":
        raise RuntimeError(f'torch\'s PrivateUse1 is already the device "{taken}", so "npu" cannot be emulated')
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        raise RuntimeError(
            "emulating an NPU needs a torch whose backends can be written in Python "
            f"(torch.utils.backend_registration, tested with 2.13), got torch {torch.__version__}"
        )
    from advance_step.ascend._npu_device import add_device

    device = add_device()
    operators = torch.library.Library("npu", "FRAGMENT")
    schema = str(torch.ops.advance_step.npu_advance_step_flashattn.default._schema)
    operators.define(schema.removeprefix("advance_step::"))
    operators.impl("npu_advance_step_flashattn", advance_step.npu_advance_step_flashattn, "PrivateUse1")
    operators.impl("npu_advance_step_flashattn", _refuse_cpu, "CPU")

    module = TorchNpu("torch_npu")
    vars(module).update(
        __spec__=importlib.machinery.ModuleSpec("torch_npu", loader=None, is_package=True),
        __path__=[],
        __version__=f"0+advance_step.{advance_step.__version__}",
        npu=device,
        npu_advance_step_flashattn=torch.ops.npu.npu_advance_step_flashattn,
        _operators=operators,  # a library that is dropped takes its operators along
    )
    sys.modules["torch_npu"] = module
    sys.modules["torch_npu.npu"] = device


def _refuse_cpu(input_tokens: torch.Tensor, *others: object, **options: object) -> NoReturn:
    raise ValueError(
        f"npu_advance_step_flashattn: input_tokens: expected a tensor on npu:0, got one on {input_tokens.device} "
        "(torch_npu's operators serve an NPU alone; advance_step.npu_advance_step_flashattn serves any device)"
    )
