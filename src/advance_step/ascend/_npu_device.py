"""A device "npu" whose memory is the CPU's: one tensor class over torch's PrivateUse1, and `torch.npu`.

Every operator on an `NpuTensor` runs on the CPU tensor inside it, so values, views and aliasing are the CPU's own,
while device, type and refusals are those of a device. Speed is not a purpose.
"""

from __future__ import annotations

import functools
import re
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from advance_step.ascend._backward_errors import BackwardGuard, raise_backward_errors
from advance_step.ascend._npu_module import NpuModule
from advance_step.ascend._rnn_cells import CELLS
from advance_step.errors import Call

aten = torch.ops.aten
# What a real device, too, lets meet CPU tensors: copies, indices that lie on the CPU, and what has to lie there.
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_LENGTHS = {"_pack_padded_sequence": ("lengths",), "_ctc_loss": ("input_lengths", "target_lengths")}
_LENGTHS["_ctc_loss_backward"] = _LENGTHS["_ctc_loss"]
_OURS = ("advance_step", "npu")
_DEVICE_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


class NpuTensor(torch.Tensor):
    """A tensor that says it is on npu:0; `_cpu` is its memory, without the bits that say conjugated or negated."""

    _cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, cpu: torch.Tensor) -> NpuTensor:
        conjugated, negated = cpu.is_conj(), cpu.is_neg()
        cpu = cpu.conj() if conjugated else cpu
        cpu = cpu._neg_view() if negated else cpu
        with torch.inference_mode(cpu.is_inference()):  # a view of an ordinary tensor is one in this mode as well
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                cpu.size(),
                strides=cpu.stride(),
                storage_offset=cpu.storage_offset(),
                dtype=cpu.dtype,
                device=torch.device("npu:0"),
            )
        torch._C._set_conj(tensor, conjugated)  # composite operators ask the tensor that they are given
        torch._C._set_neg(tensor, negated)
        tensor._cpu = cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run_on_cpu(func, *args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        contents = torch._tensor_str._tensor_str(_inner(self), indent=7) if self.numel() else "[]"
        text = torch._tensor_str._str(self, tensor_contents=contents)  # a subclass's: NpuTensor(..), Parameter(..)
        if _is_parameter(self):
            text = "Parameter containing:\n" + text.removeprefix("Parameter(").removesuffix(")")
        text = re.sub(r"\n {10}(?=\w+=)", "\n" + 7 * " ", text)  # what stands under NpuTensor( moves under tensor(
        return text.replace("NpuTensor(", "tensor(", 1)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As torch saves tensors of devices without storage of their own: the file names no class of this package.
        state = (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, state

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copy, copy.requires_grad) if _is_parameter(self) else copy
        return memo[id(self)]

    def tolist(self) -> Any:
        return _inner(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert npu:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def data_ptr(self) -> int:
        return self._cpu.data_ptr()

    def share_memory_(self) -> NpuTensor:
        self._cpu.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self._cpu.is_shared()

    @property
    def data(self) -> torch.Tensor:
        return NpuTensor(_inner(self).detach())  # shares the memory, but not, as detach() does, the count of versions

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, NpuTensor):
            raise RuntimeError(f"data: expected a tensor on {self.device}, got one on {value.device}")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._cpu = value._cpu.detach()  # the same memory, an object of its own


def run_on_cpu(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run one operator on the inner CPU tensors and wrap what comes out; also the kernel of the factory functions."""
    if func._can_decompose() and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
        return result  # e.g. `to`, which arrives whole in inference mode: its copy is made by _to_copy
    if func in CELLS:
        return CELLS[func](*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    for device in devices:
        if device.type == "npu" and device.index not in (None, 0):
            raise RuntimeError(f"invalid device {device}: the emulated machine has one NPU, npu:0")
    inner = [_inner(leaf) for leaf in leaves]
    outer = {id(cpu): leaf for cpu, leaf in zip(inner, leaves, strict=True) if isinstance(leaf, NpuTensor)}
    if outer:
        _refuse_mixed_devices(func, args, kwargs)
    to_npu = any(device.type == "npu" for device in devices) if devices else bool(outer)

    inner_args, inner_kwargs = tree_unflatten(inner, spec)
    try:
        if func.namespace == "npu":  # torch_npu's operators: the device's kernel, which ascend.torch_npu can replace
            result = func.redispatch(_DEVICE_KERNEL, *inner_args, **inner_kwargs)
        else:
            result = func(*inner_args, **inner_kwargs)
    except ValueError as refusal:
        if func.namespace not in _OURS:
            raise
        raise type(refusal)(str(refusal).replace(" on cpu", " on npu:0")) from None

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        # What an operator changed in place comes back as the object that went in.
        written = outer.get(id(value))
        if written is None:
            return NpuTensor(value) if to_npu else value
        if _geometry(written) != _geometry(value):  # t_, unsqueeze_, resize_, set_
            torch.Tensor.data.__set__(written, NpuTensor(value))  # type: ignore[attr-defined]
        return written

    if func is aten._pack_padded_sequence.default:
        return wrap(result[0]), result[1]  # the sizes of the batches stay on the CPU, on every device
    return tree_map(wrap, result)


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)  # by a mark on the tensor: its type is NpuTensor all the same


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _inner(leaf: Any) -> Any:
    if isinstance(leaf, NpuTensor):
        cpu = leaf._cpu.conj() if leaf.is_conj() else leaf._cpu
        return cpu._neg_view() if leaf.is_neg() else cpu
    if isinstance(leaf, torch.device) and leaf.type == "npu":
        return torch.device("cpu")
    return leaf


def _refuse_mixed_devices(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A CPU tensor among "npu" tensors is an error, except where a device takes one: copies, indices, 0-dim scalars."""
    named = {schema.name: (schema, value) for schema, value in zip(func._schema.arguments, args, strict=False)}
    named |= {schema.name: (schema, kwargs[schema.name]) for schema in func._schema.arguments if schema.name in kwargs}
    if func.namespace in _OURS:
        Call(func._schema.name.split("::")[1], {name: value for name, (_, value) in named.items()}).one_device()
        return
    if func in _COPIES:
        return
    lengths = _LENGTHS.get(func.overloadpacket.__name__, ())
    for name, (schema, value) in named.items():
        if (name == "indices" and func.overloadpacket in _INDEXING) or name in lengths:
            continue
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, NpuTensor):
                continue
            if tensor.dim() > 0 or schema.is_write:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {name} is on {tensor.device}, "
                    f"other tensors are on npu:0 (in {func})"
                )


def _reduce_shared(tensor: NpuTensor) -> tuple[Any, ...]:
    """How a tensor goes to another process: its memory, moved to shared memory, is not copied."""
    if tensor.requires_grad and not tensor.is_leaf:
        raise RuntimeError("a tensor with a history of gradients cannot be sent to another process: detach() it first")
    return _rebuild_shared, (tensor._cpu.detach(), tensor.requires_grad, _is_parameter(tensor))


def _rebuild_shared(cpu: torch.Tensor, requires_grad: bool, parameter: bool) -> torch.Tensor:
    from advance_step.ascend.emulation import enable

    enable()  # the process may have started afresh
    tensor = NpuTensor(cpu)
    return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


class NpuStorage(torch.UntypedStorage):
    """CPU memory that says it is on npu:0, so that what `torch.load` rebuilds on it is an `NpuTensor`."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("npu:0")


def _load_storage(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """`torch.load` asks this for every storage, with the location of its file or of `map_location`."""
    if not location.startswith("npu"):
        return None
    on_npu = NpuStorage(storage.nbytes())
    on_npu.copy_(storage)
    return on_npu


_kernels: list[torch.library.Library] = []  # a library that is dropped takes its kernels along


def add_device() -> NpuModule:
    """Make "npu" a device of this process; torch allows one such device in a process, and none can be taken away."""
    module = NpuModule("torch.npu")
    _setup_privateuseone_for_python_backend("npu", backend_module=module, device_guard=BackwardGuard())
    raise_backward_errors()
    every = torch.library.Library("_", "IMPL")
    every.fallback(run_on_cpu, "PrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    # torch.tensor, new_tensor and the like read and copy with Python dispatch off, where only kernels of its own count.
    for name in ("copy_", "_local_scalar_dense", "_to_copy"):
        some.impl(name, functools.partial(run_on_cpu, getattr(aten, name).default), "PrivateUse1")
    for cell, compute in CELLS.items():
        some.impl(cell._schema.name.removeprefix("aten::"), compute, "AutogradPrivateUse1")
    some.impl("_pin_memory", lambda self, device=None: self.clone(), "CPU")  # all memory here is the host's
    _kernels.extend([every, some])
    ForkingPickler.register(NpuTensor, _reduce_shared)
    torch.serialization.register_package(9, lambda obj: None, _load_storage)  # type: ignore[arg-type]
    return module
