"""32 greedy steps of a tiny model over a paged cache on an NPU; its tokens must be those of a plain CPU forward.

On an Ascend machine: `python decode_loop.py`; on any other: `advance-step emulate-npu decode_loop.py`.
"""

import torch
import torch_npu
from torch import nn

num_seqs, num_queries, block_size, num_pages, steps = 4, 3, 4, 40, 32  # row 3 pads the batch
vocab, hidden, max_len = 97, 16, 48


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, hidden), nn.Embedding(max_len, hidden)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.head = nn.Linear(hidden, vocab)

    def project(self, tokens, positions):
        x = self.token(tokens) + self.position(positions)  # [rows, hidden]
        return x, self.query(x), self.key(x), self.value(x)

    def sample(self, x, query, keys, values, visible):
        scores = (keys @ query[:, :, None])[:, :, 0]  # [rows, history]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return self.head(x + (weights[:, None] @ values)[:, 0]).argmax(-1, keepdim=True)  # [rows, 1]


torch.manual_seed(0)
cpu_model = TinyModel().eval()
first = torch.randint(vocab, (num_queries, 1))

with torch.inference_mode():
    model = TinyModel().to("npu").eval()
    model.load_state_dict(cpu_model.state_dict())
    keys, values = torch.zeros(2, num_pages * block_size, hidden, device="npu")
    block_tables = torch.randperm(num_pages)[: num_seqs * 9].view(num_seqs, 9).npu()  # [num_seqs, W]
    input_tokens, input_positions, seq_lens, slot_mapping = torch.zeros(4, num_seqs, dtype=torch.int64, device="npu")
    place = torch.arange(9 * block_size, device="npu")
    # The slots of each live row's pages, in order: [num_queries, W * block_size]
    history = block_tables[:num_queries, place // block_size] * block_size + place % block_size

    sampled, generated = first.npu(), []
    for _ in range(steps):
        torch_npu.npu_advance_step_flashattn(
            input_tokens, sampled, input_positions, seq_lens, slot_mapping, block_tables,
            num_seqs, num_queries, block_size,
        )  # fmt: skip
        x, query, key, value = model.project(input_tokens[:num_queries], input_positions[:num_queries])
        keys[slot_mapping[:num_queries]], values[slot_mapping[:num_queries]] = key, value
        sampled = model.sample(x, query, keys[history], values[history], place < seq_lens[:num_queries, None])
        generated.append(sampled)
    on_npu = torch.cat(generated, 1).cpu()  # [num_queries, steps]

    tokens = first  # the same on the CPU, without a cache: every step reads the whole sequence
    for _ in range(steps):
        every = [cpu_model.project(row, torch.arange(tokens.size(1))) for row in tokens]
        x, query, key, value = (torch.stack(part) for part in zip(*every, strict=True))  # [rows, length, hidden]
        visible = torch.ones(key.shape[:2], dtype=torch.bool)
        tokens = torch.cat([tokens, cpu_model.sample(x[:, -1], query[:, -1], key, value, visible)], 1)

print(on_npu.tolist())
if not torch.equal(on_npu, tokens[:, 1:]):
    raise SystemExit(f"the CPU's tokens are {tokens[:, 1:].tolist()}")
print(f"{steps} steps of {num_queries} rows: the CPU's tokens")
