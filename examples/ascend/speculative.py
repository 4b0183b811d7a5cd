"""One speculative step on an NPU: two drafts a row, some of them rejected, checked against the contract.

On an Ascend machine: `python speculative.py`; on any other: `advance-step emulate-npu speculative.py`.
"""

import torch
import torch_npu

num_seqs, spec_num, block_size = 3, 2, 8
width = 1 + spec_num  # T: a token and its drafts
sampled = torch.tensor([[11, 12, 13], [21, 22, -1], [31, -1, -1]])  # [num_seqs, T]; -1 after the first rejected draft
drafts = torch.tensor([[14, 15], [24, 25], [34, 35]])  # [num_seqs, spec_num]: what the draft model proposes next
accepted = torch.tensor([2, 1, 0])  # [num_seqs]
positions = torch.tensor([[5, 6, 7], [13, 14, 15], [20, 21, 22]])  # [num_seqs, T]
block_tables = torch.tensor([[4, 1, 0, 0], [2, 7, 3, 0], [9, 6, 5, 8]])  # [num_seqs, W]

# The state is flat, [num_seqs * T]: by its source the published kernel takes no other form.
input_tokens = torch.full((num_seqs * width,), 55, device="npu")
input_positions = positions.flatten().npu()
seq_lens = (positions + 1).flatten().npu()
slot_mapping = torch.full((num_seqs * width,), 55, device="npu")

torch_npu.npu_advance_step_flashattn(
    input_tokens, sampled.npu(), input_positions, seq_lens, slot_mapping, block_tables.npu(),
    num_seqs, num_seqs, block_size, spec_token=drafts.npu(), accepted_num=accepted.npu(),
)  # fmt: skip
torch.npu.synchronize()

for i in range(num_seqs):
    last = [token for token in sampled[i].tolist() if token != -1][-1]
    tokens = [last, *drafts[i].tolist()]
    for j in range(width):
        at = i * width + j
        row = [int(state[at]) for state in (input_tokens, input_positions, seq_lens, slot_mapping)]
        p = int(positions[i, j]) + 1 + int(accepted[i])
        slot = int(block_tables[i, p // block_size]) * block_size + p % block_size
        if row != (expected := [tokens[j], p, p + 1, slot]):
            raise SystemExit(f"row {i}, {j}: token, position, length, slot are {row}; the contract says {expected}")
print("speculative: every row as the contract says")
