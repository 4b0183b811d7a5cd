"""Tensors of a call, each moved to where the byte after its last, and the page before its first, cannot be touched."""

from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
SIZE = 1 << 30  # reserved, not used
GAP = 1 << 21  # of nothing, between two tensors
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which mmap does not name before Python 3.13

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_area = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
_base = ctypes.addressof(ctypes.c_char.from_buffer(_area))


def _allow(start: int, size: int, access: int) -> None:
    if _libc.mprotect(start, size, access):
        raise OSError(ctypes.get_errno(), "mprotect")


class Arena:
    """Within it, `pointer(tensor)` is an address that stands for the tensor; at its end the tensors hold what is there.

    Tensors of one storage stay one storage.
    """

    def __enter__(self) -> Arena:
        _allow(_base, SIZE, 0)
        self._end = _base + GAP
        self._moved: dict[int, tuple[int, torch.UntypedStorage]] = {}
        return self

    def pointer(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        if key not in self._moved:
            start, pages = self._end, -(-size // PAGE) * PAGE
            self._end += pages + GAP
            if pages:
                _allow(start, pages, mmap.PROT_READ | mmap.PROT_WRITE)
                ctypes.memmove(start + pages - size, storage.data_ptr(), size)
            self._moved[key] = (start + pages - size, storage)
        return self._moved[key][0] + tensor.storage_offset() * tensor.element_size()

    def __exit__(self, *_: object) -> None:
        for address, storage in self._moved.values():
            if storage.nbytes():
                ctypes.memmove(storage.data_ptr(), address, storage.nbytes())
