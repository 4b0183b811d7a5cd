"""torch.nn and torch's functions on the emulated device, forward and backward, against the CPU.

torch chooses by the device's kind in many places (fused cells, attention kernels, fast paths); each of these calls
takes one of them. `test_emulation.py` runs this in a process of its own; pytest does not collect it by itself.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from advance_step.ascend import emulation

emulation.enable()


def moved(value, device):
    """`value` on `device`, leaves of their own where they want gradients."""
    return tree_map(
        lambda t: t.detach().clone().to(device).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t,
        value,
    )


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def result(call, inputs, parameters=()):
    """What `call` gives for `inputs`, and the gradients of its squares for them and for `parameters`."""
    torch.manual_seed(1)
    out = tensors(call(*inputs))
    sources = [t for t in [*tensors(inputs), *parameters] if t.requires_grad]
    targets = [t.square().sum().abs() for t in out if t.requires_grad and torch.is_grad_enabled()]
    grads = torch.autograd.grad(targets, sources, allow_unused=True) if targets and sources else ()
    return out, [grad for grad in grads if grad is not None]


def compare(on_npu, on_cpu):
    for npu, cpu in zip(on_npu, on_cpu, strict=True):
        assert npu.device == torch.device("npu:0") and cpu.device == torch.device("cpu")
        torch.testing.assert_close(npu.cpu(), cpu, rtol=1e-4, atol=1e-5)


def rand(*shape):
    return torch.rand(shape, requires_grad=True)


ids = torch.tensor([[1, 5, 2], [7, 0, 5]])
mask = torch.tensor([[False, False, True], [False, True, True]])

MODULES = {
    "Linear": (lambda: nn.Linear(4, 3), lambda: [rand(2, 4)]),
    "Bilinear": (lambda: nn.Bilinear(4, 3, 2), lambda: [rand(5, 4), rand(5, 3)]),
    "Embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), lambda: [ids]),
    "EmbeddingBag-sum": (lambda: nn.EmbeddingBag(9, 4, mode="sum"), lambda: [ids]),
    "EmbeddingBag-mean": (lambda: nn.EmbeddingBag(9, 4, padding_idx=5), lambda: [ids[0], torch.tensor([0, 2])]),
    "EmbeddingBag-max": (lambda: nn.EmbeddingBag(9, 4, mode="max"), lambda: [ids]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), lambda: [rand(2, 4, 7)]),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), lambda: [rand(2, 3, 8, 8)]),
    "Conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), lambda: [rand(1, 3, 5, 5)]),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda: [rand(1, 2, 4, 5, 5)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), lambda: [rand(1, 3, 4, 4)]),
    "Unfold-Fold": (
        lambda: nn.Sequential(nn.Unfold(2), nn.Fold((4, 5), 2)),
        lambda: [rand(1, 3, 4, 5)],
    ),
    "RNN": (lambda: nn.RNN(8, 4, nonlinearity="relu"), lambda: [rand(3, 1, 8)]),
    "LSTM": (lambda: nn.LSTM(8, 4), lambda: [rand(3, 1, 8)]),
    "LSTM-all": (
        lambda: nn.LSTM(8, 4, num_layers=2, batch_first=True, bidirectional=True, proj_size=3, dropout=0.5),
        lambda: [rand(2, 3, 8)],
    ),
    "LSTM-no-bias": (lambda: nn.LSTM(8, 4, bias=False), lambda: [rand(3, 8), (rand(1, 4), rand(1, 4))]),
    "GRU": (lambda: nn.GRU(8, 4, num_layers=2, bidirectional=True), lambda: [rand(3, 2, 8), rand(4, 2, 4)]),
    "RNNCell": (lambda: nn.RNNCell(8, 4), lambda: [rand(2, 8), rand(2, 4)]),
    "LSTMCell": (lambda: nn.LSTMCell(8, 4), lambda: [rand(2, 8), (rand(2, 4), rand(2, 4))]),
    "GRUCell": (lambda: nn.GRUCell(8, 4, bias=False), lambda: [rand(2, 8)]),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), lambda: [rand(2, 3, 4, 4)]),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), lambda: [rand(2, 3, 4)]),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), lambda: [rand(2, 4, 3)]),
    "LayerNorm": (lambda: nn.LayerNorm((3, 4)), lambda: [rand(2, 3, 4)]),
    "RMSNorm": (lambda: nn.RMSNorm(4), lambda: [rand(2, 3, 4)]),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), lambda: [rand(1, 4, 3, 3)]),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, return_indices=True), lambda: [rand(1, 2, 6, 6)]),
    "AvgPool3d": (lambda: nn.AvgPool3d(2, padding=1, count_include_pad=False), lambda: [rand(1, 2, 4, 4, 4)]),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, None)), lambda: [rand(1, 2, 7, 5)]),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(3), lambda: [rand(1, 2, 7)]),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=3), lambda: [rand(1, 2, 7, 7)]),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), lambda: [rand(1, 2, 6, 6)]),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), lambda: [rand(1, 2, 4, 4)]),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), lambda: [rand(1, 2, 4)]),
    "ConstantPad2d": (lambda: nn.ConstantPad2d((1, -1), 3.5), lambda: [rand(1, 2, 4)]),
    "Upsample-bicubic": (lambda: nn.Upsample(scale_factor=1.5, mode="bicubic"), lambda: [rand(1, 2, 4, 4)]),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), lambda: [rand(1, 8, 2, 2)]),
    "Dropout": (lambda: nn.Dropout(0.3), lambda: [rand(4, 5)]),
    "Dropout2d": (lambda: nn.Dropout2d(0.3), lambda: [rand(2, 4, 3, 3)]),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), lambda: [rand(4, 5)]),
    "RReLU": (lambda: nn.RReLU(), lambda: [rand(4, 5) - 0.5]),
    "PReLU": (lambda: nn.PReLU(3), lambda: [rand(2, 3) - 0.5]),
    "activations": (
        lambda: nn.Sequential(nn.GELU(), nn.SiLU(), nn.Mish(), nn.ELU(), nn.Softplus(), nn.GLU(), nn.Softmax(-1)),
        lambda: [rand(3, 8)],
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: [*[rand(2, 3, 8)] * 3, mask],
    ),
    "MultiheadAttention-dims": (
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, add_zero_attn=True),
        lambda: [rand(3, 2, 8), rand(4, 2, 5), rand(4, 2, 6)],
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu"),
        lambda: [rand(2, 3, 8)],
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: [rand(2, 3, 8), None, mask],
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, norm_first=True),
        lambda: [rand(3, 2, 8), rand(4, 2, 8)],
    ),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), lambda: [rand(2, 4)]),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), lambda: [rand(2, 4)]),
    "AdaptiveLogSoftmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3, 6]),
        lambda: [rand(5, 4), torch.tensor([0, 9, 4, 6, 2])],
    ),
}


@pytest.mark.parametrize("how", ["train", "eval", "inference"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, how):
    make, draw = MODULES[name]
    torch.manual_seed(0)
    on_cpu, inputs = make().train(how == "train"), draw()
    on_npu = copy.deepcopy(on_cpu).to("npu")
    results = []
    with torch.inference_mode(how == "inference"):
        for module, device in ((on_npu, "npu"), (on_cpu, "cpu")):
            results.append(result(module, moved(inputs, device), module.parameters()))
    for npu, cpu in zip(*results, strict=True):
        compare(npu, cpu)
    compare([*on_npu.buffers()], [*on_cpu.buffers()])


def packed(x, lengths, weight):
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, _ = nn.utils.rnn.pad_packed_sequence(sequence._replace(data=sequence.data @ weight), batch_first=True)
    return out


classes = torch.tensor([2, 0, 1])

FUNCTIONS = {
    "attention": (F.scaled_dot_product_attention, lambda: [rand(1, 2, 3, 4) for _ in range(3)]),
    "attention-causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        lambda: [rand(1, 4, 3, 8), rand(1, 2, 3, 8), rand(1, 2, 3, 8)],
    ),
    "attention-mask-dropout": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, dropout_p=0.25),
        lambda: [*(rand(1, 2, 3, 4) for _ in range(3)), torch.ones(3, 3).tril().bool()],
    ),
    "interpolate": (
        lambda x: [F.interpolate(x, size=5, mode=m) for m in ("nearest", "bilinear", "area")],
        lambda: [rand(1, 2, 3, 4)],
    ),
    "grid_sample": (
        lambda x, theta: F.grid_sample(x, F.affine_grid(theta, (1, 2, 4, 4), align_corners=False), align_corners=False),
        lambda: [rand(1, 2, 5, 5), rand(1, 2, 3)],
    ),
    "packed_sequence": (packed, lambda: [rand(3, 4, 2), torch.tensor([2, 4, 1]), rand(2, 5)]),
    "cross_entropy": (
        lambda x, y, w: [F.cross_entropy(x, y, w, label_smoothing=0.1), F.cross_entropy(x, x.softmax(-1), w)],
        lambda: [rand(3, 4), classes, torch.rand(4)],
    ),
    "nll_2d": (
        lambda x, y: F.nll_loss(x.log_softmax(1), y),
        lambda: [rand(1, 4, 3, 3), torch.arange(9).view(1, 3, 3) % 4],
    ),
    "ctc": (
        lambda x, y: F.ctc_loss(x.log_softmax(-1), y, torch.tensor([5, 4]), torch.tensor([3, 2]), reduction="sum"),
        lambda: [rand(5, 2, 6), torch.tensor([[1, 2, 2], [4, 1, 0]])],
    ),
    "losses": (
        lambda x, y: [
            *(f(x, y) for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.soft_margin_loss)),
            *(f(x, y) for f in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.poisson_nll_loss)),
            F.gaussian_nll_loss(x, y, x.abs() + 0.1),
            F.cosine_embedding_loss(x, y, x[:, 0].sign()),
            F.triplet_margin_loss(x, y, x.flip(0)),
            F.margin_ranking_loss(x, y, x.sign()),
        ],
        lambda: [rand(3, 4), torch.rand(3, 4)],
    ),
    "multi_margin": (
        lambda x, y: [F.multi_margin_loss(x, y), F.multilabel_soft_margin_loss(x, x.detach().round())],
        lambda: [rand(3, 4), classes],
    ),
    "normalize-similarity": (
        lambda x, y: [F.normalize(x), F.cosine_similarity(x, y), F.pdist(x), torch.cdist(x, y)],
        lambda: [rand(3, 4), rand(3, 4)],
    ),
    "fft": (
        lambda x: [
            torch.fft.irfft(torch.fft.rfft(x) * 2),
            torch.view_as_real(torch.fft.fft2(x)),
            torch.fft.hfft(torch.fft.ihfft(x)),
            torch.fft.hfftn(torch.complex(x, x * 3)),
            torch.fft.fftshift(torch.fft.fftfreq(4, device=x.device) * x),
        ],
        lambda: [rand(3, 4)],
    ),
    "stft": (
        lambda x, w: torch.istft(torch.stft(x, 8, window=w, return_complex=True), 8, window=w),
        lambda: [rand(40), torch.hann_window(8)],
    ),
    "conjugated": (
        lambda x, y: [
            z := torch.complex(x, y),
            z.conj() @ z,
            z.conj().imag * 2,
            z.mH.real,
            torch.view_as_real(z.conj().resolve_conj()),
            z.conj().clone().exp(),
            torch.vdot(z[0], z[1]),
        ],
        lambda: [rand(3, 3), rand(3, 3)],
    ),
    "linalg": (
        lambda x: [
            x.inverse(),
            torch.linalg.det(x),
            torch.linalg.slogdet(x)[1],
            torch.linalg.solve(x, x.T),
            torch.linalg.cholesky(x @ x.T),
            torch.linalg.svdvals(x),
            torch.linalg.eigvalsh(x + x.T),
            torch.linalg.qr(x)[1],
            torch.linalg.pinv(x),
            torch.linalg.matrix_norm(x, 2),
            torch.linalg.lstsq(x, x.T).solution,
            torch.linalg.matrix_exp(x),
            torch.linalg.eigvals(x).abs(),
        ],
        lambda: [(torch.rand(4, 4) + 4 * torch.eye(4)).requires_grad_()],
    ),
    "matmul": (
        lambda x, y: [
            torch.einsum("bij,bjk->bik", x, y),
            torch.bmm(x, y),
            torch.baddbmm(x[:, :, :2], x, y),
            x @ y[0],
            torch.tensordot(x, y, dims=([2], [1])),
            torch.kron(x[0], y[0]),
            torch.cumsum(x @ y, 1),
        ],
        lambda: [rand(2, 3, 4), rand(2, 4, 2)],
    ),
    "sort": (
        lambda x: [
            *x.sort(descending=True),
            *x.topk(2),
            x.kthvalue(2).values,
            x.median(1).values,
            x.mode(1).values,
            x.quantile(0.3, 1),
            x.argsort(),
            x.detach().unique(),
            torch.searchsorted(x[0].detach().sort().values, x.detach()),
            x.cummax(1).values,
            x.logcumsumexp(1),
        ],
        lambda: [rand(3, 5)],
    ),
    "index": (
        lambda x, i: [
            x[i],
            x[:, i],
            x.gather(0, i[:, None]),
            x.scatter(0, i[:, None], 2.5),
            x.scatter_add(0, i[:, None].expand(3, 3), x),
            x.scatter_reduce(0, i[:, None].expand(3, 3), x, "amax"),
            x.index_add(0, i, x),
            x.index_copy(0, i, x * 2),
            x.index_fill(1, i, 0.5),
            x.index_put((i, i), x[0, 0], accumulate=True),
            x.index_select(1, i),
            x.take(i),
            x.masked_fill(x > 0.5, 1),
            x.masked_scatter(x > 0.5, x * 2),
            x.take_along_dim(i[:, None], 0),
            torch.where(x > 0.5, x, i),
            x.repeat_interleave(i + 1, 0),
            torch.bucketize(x.detach(), x.detach()[0].sort().values),
            torch.bincount(i),
            x.detach().histc(4),
        ],
        lambda: [rand(3, 3), torch.tensor([2, 0, 1])],
    ),
    "foreach": (
        lambda x, y: [*torch._foreach_add([x, y], 2.0), *torch._foreach_norm([x, y]), nn.utils.get_total_norm([x, y])],
        lambda: [rand(3), rand(4)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    call, draw = FUNCTIONS[name]
    torch.manual_seed(0)
    inputs = draw()
    for npu, cpu in zip(*(result(call, moved(inputs, device)) for device in ("npu", "cpu")), strict=True):
        compare(npu, cpu)


RANDOM = {
    "uniform_": lambda x: x.uniform_(2, 3),
    "normal_": lambda x: x.normal_(),
    "bernoulli": lambda x: x.fill_(0.3).bernoulli(),
    "exponential_": lambda x: x.exponential_(),
    "cauchy_": lambda x: x.cauchy_(),
    "geometric_": lambda x: x.geometric_(0.5),
    "log_normal_": lambda x: x.log_normal_(),
    "random_": lambda x: x.random_(9),
    "randn_like": torch.randn_like,
    "multinomial": lambda x: torch.multinomial(x.fill_(0.5), 2),
    "poisson": lambda x: torch.poisson(x.fill_(2.5)),
    "randperm": lambda x: torch.randperm(7, device=x.device),
    "normal": lambda x: torch.normal(x.fill_(1), 2.0),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x.fill_(0.5), hard=True),
    "kaiming": lambda x: nn.init.kaiming_uniform_(x),
    "trunc_normal": lambda x: nn.init.trunc_normal_(x),
    "orthogonal": lambda x: nn.init.orthogonal_(x),
    "distribution": lambda x: torch.distributions.Gamma(x.fill_(2), 1.0).sample(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_the_cpus(name):
    drawn = []
    for device in ("npu", "cpu"):
        torch.manual_seed(3)
        drawn.append(RANDOM[name](torch.empty(4, 5, device=device)))
    compare(*([t] for t in drawn))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_training(optimizer):
    trained = []
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).to(device)
        steps = optimizer(model.parameters(), lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            F.cross_entropy(model(ids.to(device)), torch.tensor([1, 2], device=device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            steps.step()
        trained.append([p.detach() for p in model.parameters()])
    compare(*trained)
