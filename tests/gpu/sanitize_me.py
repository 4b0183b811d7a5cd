"""Every operator on tensors that end where their memory ends, for compute-sanitizer (test_processes.py).

Run it as `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize_me.py`.
"""

from __future__ import annotations

import importlib.util

import torch
from gpu_calls import CALLS, draw_call, function, on

import advance_step

modules = [advance_step]
if importlib.util.find_spec("triton"):
    from advance_step import kernels

    modules.append(kernels)

count = 0
for module in modules:
    for call, (_, bits) in CALLS.items():
        for rows in (1, 33, 257, 2049):
            for mix in (0, 2**bits - 1):
                function(module, call)(**on("cuda", draw_call(call, rows, mix, spread=False, margin=0)))
                torch.cuda.synchronize()
                count += 1
print(f"ran {count} calls")
