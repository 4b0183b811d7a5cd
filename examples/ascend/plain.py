"""One decode step of a padded batch on an NPU, checked against the contract row by row.

On an Ascend machine: `python plain.py`; on any other: `advance-step emulate-npu plain.py`.
"""

import torch
import torch_npu

num_seqs, num_queries, block_size = 6, 4, 16  # rows 4 and 5 pad the batch
block_tables = torch.tensor(
    [[7, 2, 0], [5, 3, 0], [9, 4, 8], [6, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.int64
)  # [num_seqs, W]
seq_lens = torch.tensor([31, 16, 40, 1, 0, 0])  # [num_seqs]
sampled = torch.tensor([[101], [102], [103], [104]])  # [num_queries, 1]

input_tokens = torch.full((num_seqs,), 55, device="npu")
input_positions = torch.full((num_seqs,), 55, device="npu")
slot_mapping = torch.full((num_seqs,), 55, device="npu")
device_lens = seq_lens.npu()

torch_npu.npu_advance_step_flashattn(
    input_tokens, sampled.npu(), input_positions, device_lens, slot_mapping, block_tables.npu(),
    num_seqs, num_queries, block_size,
)  # fmt: skip
torch.npu.synchronize()

for i in range(num_seqs):
    row = [int(state[i]) for state in (input_tokens, input_positions, device_lens, slot_mapping)]
    p = int(seq_lens[i])  # the position of the token that the model reads next
    slot = int(block_tables[i, p // block_size]) * block_size + p % block_size
    expected = [int(sampled[i]), p, p + 1, slot] if i < num_queries else [0, 0, p, -1]
    if row != expected:
        raise SystemExit(f"row {i}: token, position, length, slot are {row}; the contract says {expected}")
print("plain: every row as the contract says")
