"""`torch.npu` of the emulated device."""

from __future__ import annotations

import contextlib
import types
from typing import NoReturn

import torch


class NpuModule(types.ModuleType):
    """`torch.npu`: one device, whose work is done when the call returns."""

    def __getattr__(self, name: str) -> NoReturn:
        ours = ", ".join(sorted(n for n in vars(NpuModule) if not n.startswith("_")))
        raise AttributeError(f"torch.npu.{name} is not emulated; advance_step emulates {ours}")

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: int | str | torch.device) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        kind = "npu" if isinstance(device, int) else torch.device(device).type
        if kind != "npu" or index not in (None, 0):
            raise RuntimeError(f"invalid device {device!r}: the emulated machine has one NPU, npu:0")

    def get_device_name(self, device: int | str | torch.device | None = None) -> str:
        return "NPU emulated on the CPU by advance_step"

    def synchronize(self, device: int | str | torch.device | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def set_compile_mode(self, jit_compile: bool = False) -> None:
        pass

    def device(self, device: int | str | torch.device) -> contextlib.AbstractContextManager[None]:
        self.set_device(device)
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []  # torch.autocast("npu") warns and does nothing; torch.utils.checkpoint makes one that is not enabled

    # The CPU's generator: its kernels draw the numbers.

    def get_rng_state(self, device: int | str | torch.device = "npu") -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: int | str | torch.device = "npu") -> None:
        torch.default_generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def _is_in_bad_fork(self) -> bool:
        return False
