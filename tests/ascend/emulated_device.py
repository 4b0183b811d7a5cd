"""The emulated device, held bit for bit to what the same code gives on CPU tensors.

`test_emulation.py` runs this in a process of its own; pytest does not collect it by itself.
"""

import copy
import io
import sys

import numpy as np
import pytest
import torch

from advance_step.ascend import emulation

emulation.enable()
import torch_npu  # noqa: E402
import torch_npu.npu  # noqa: E402


@pytest.fixture(params=[False, True], ids=["grad", "inference"], autouse=True)
def mode(request):
    with torch.inference_mode(request.param):
        yield


def same(npu, cpu):
    assert npu.device == torch.device("npu:0") and cpu.device.type == "cpu"
    assert npu.dtype == cpu.dtype and npu.stride() == cpu.stride()
    assert torch.equal(npu.cpu(), cpu)


def test_enabling_again_changes_nothing():
    emulation.enable()
    assert sys.modules["torch_npu"] is torch_npu and torch_npu.npu is torch.npu


def test_the_device_module():
    npu = torch.npu
    assert npu.is_available() and npu.device_count() == 1 and npu.current_device() == 0
    npu.set_device(0)
    npu.set_device("npu:0")
    npu.synchronize()
    for wrong in (1, "npu:1", "cuda:0"):
        with pytest.raises(RuntimeError, match="invalid device"):
            npu.set_device(wrong)
    with pytest.raises(AttributeError, match=r"torch\.npu\.Stream is not emulated; .* device_count"):
        npu.Stream()
    with pytest.raises(RuntimeError, match="invalid device npu:1: the emulated machine has one NPU"):
        torch.zeros(2, device="npu:1")


FACTORIES = {
    "tensor": lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
    "tensor_of_numpy": lambda d: torch.tensor(np.arange(6), dtype=torch.int64, device=d),
    "scalar": lambda d: torch.tensor(2.5, device=d),
    "empty_list": lambda d: torch.tensor([], device=d),
    "as_tensor": lambda d: torch.as_tensor(np.ones(3), device=d),
    "zeros": lambda d: torch.zeros(2, 3, dtype=torch.int32, device=d),
    "ones_like": lambda d: torch.ones_like(torch.zeros(3, device=d)),
    "full": lambda d: torch.full((2,), -1, device=d),
    "arange": lambda d: torch.arange(2, 9, 3, device=d),
    "eye": lambda d: torch.eye(3, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 5, device=d),
    "new_zeros": lambda d: torch.ones(2, device=d).new_zeros(3, 1),
    "new_tensor": lambda d: torch.ones(2, device=d).new_tensor([1.0, 2.0]),
    "to": lambda d: torch.arange(4).to(d),
    "to_with_dtype": lambda d: torch.arange(4).to(d, torch.float16),
    "to_transposed": lambda d: torch.arange(6).view(2, 3).t().to(d),
    "rand": lambda d: [torch.manual_seed(3), torch.rand(4, device=d)][1],
    "randint": lambda d: [torch.manual_seed(3), torch.randint(9, (4,), device=d)][1],
    "pinned": lambda d: torch.arange(3).pin_memory().to(d, non_blocking=True) if d != "cpu" else torch.arange(3),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("device", ["npu", "npu:0"])
def test_factories(name, device):
    same(FACTORIES[name](device), FACTORIES[name]("cpu"))


OPERATIONS = {
    "arithmetic": lambda x: (x * 2 + 1 - x / 3) ** 2,
    "comparison": lambda x: x > 3,
    "matmul": lambda x: x.float() @ x.float().t(),
    "softmax_argmax": lambda x: x.float().softmax(-1).argmax(-1),
    "reductions": lambda x: torch.stack([x.sum(), x.max(), x.min(), x.prod()]),
    "slices": lambda x: x[1:, ::2],
    "mask": lambda x: x[x > 4],
    "cpu_indices": lambda x: x[torch.tensor([1, 0])],
    "own_indices": lambda x: x[(x[:, 0] > 0).nonzero()[:, 0]],
    "cat_split": lambda x: torch.cat(x.split(1, dim=1)),
    "where_scalar": lambda x: torch.where(x > 4, x, 0),
    "gather_scatter": lambda x: torch.zeros_like(x).scatter_(1, x.gather(1, x % 3) % 3, 7),
    "topk": lambda x: x.topk(2).indices,
    "sort": lambda x: x.flatten().sort(descending=True).values,
    "unique": lambda x: (x // 2).unique(),
    "cumsum": lambda x: x.cumsum(0),
    "cast": lambda x: x.double().to(torch.int32),
    "cpu_scalar": lambda x: x + torch.tensor(5),
    "embedding": lambda x: torch.nn.functional.embedding(x, torch.eye(12).to(x.device)),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.float()[None, None] / 9] * 3),
    "contiguous": lambda x: x.t().contiguous(),
    "set_item": lambda x: [c := x.clone(), c.__setitem__((slice(None), 0), 9), c.__setitem__(c == 5, -1)][0],
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "in_place_shape": lambda x: x.clone().t_().unsqueeze_(0),
    "resize": lambda x: torch.empty(0, dtype=x.dtype, device=x.device).resize_(2, 3).copy_(x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    x = torch.arange(6).view(2, 3)
    same(OPERATIONS[name](x.npu()), OPERATIONS[name](x))


def test_views_share_memory_and_copies_do_not():
    base = torch.arange(12, device="npu")
    view, copied = base.view(3, 4)[1:], base.cpu()
    view[0] += 100
    view.t_()
    base[-1] = -5
    assert base.tolist() == [0, 1, 2, 3, 104, 105, 106, 107, 8, 9, 10, -5]
    assert view.tolist() == [[104, 8], [105, 9], [106, 10], [107, -5]] and view.stride() == (1, 4)
    assert view.data_ptr() == base.data_ptr() + 4 * 8
    assert copied.tolist() == list(range(12))
    again = copied.npu()
    copied.zero_()
    assert again.tolist() == list(range(12))


def test_data_is_shared_and_can_be_exchanged():
    x, y = torch.zeros(2, device="npu"), torch.ones(3, dtype=torch.float64, device="npu")
    x.data.add_(1)
    assert x.tolist() == [1.0, 1.0]
    x.data = y
    assert x.add_(y) is x and y.tolist() == [2.0, 2.0, 2.0] and x.dtype == torch.float64
    with pytest.raises(RuntimeError, match="data: expected a tensor on npu:0, got one on cpu"):
        x.data = torch.ones(3)


def test_moving_to_where_it_is_gives_the_same_tensor():
    x = torch.ones(2, device="npu")
    assert x.to("npu") is x and x.npu() is x and x.to("npu:0") is x
    assert x.is_npu and not x.is_cpu and x.type() == "torch.npu.FloatTensor"


def test_copies_both_ways():
    npu, cpu = torch.zeros(3, device="npu"), torch.tensor([1.0, 2.0, 3.0])
    assert npu.copy_(cpu) is npu
    cpu.zero_().copy_(npu * 2)
    assert cpu.tolist() == [2.0, 4.0, 6.0] and npu.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda npu, cpu: npu + cpu,
        lambda npu, cpu: npu.add_(cpu),
        lambda npu, cpu: cpu.add_(npu),
        lambda npu, cpu: torch.cat([npu, cpu]),
        lambda npu, cpu: torch.add(npu, npu, out=cpu),
        lambda npu, cpu: cpu.sum().add_(npu.sum()),
        lambda npu, cpu: npu.index_put_((torch.tensor([0, 1]),), cpu),
    ],
)
def test_two_devices_in_one_operator_are_refused_and_nothing_is_written(call):
    npu, cpu = torch.ones(2, device="npu"), torch.ones(2)
    with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device.* cpu.* npu:0"):
        call(npu, cpu)
    assert npu.tolist() == cpu.tolist() == [1.0, 1.0]


def test_numpy_wants_the_host():
    x = torch.arange(3, device="npu")
    for convert in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match=r"can't convert npu:0 .* Tensor\.cpu\(\)"):
            convert()
    assert x.cpu().numpy().tolist() == x.numpy(force=True).tolist() == [0, 1, 2]


def test_printing():
    assert repr(torch.tensor([1, 2], device="npu")) == "tensor([1, 2], device='npu:0')"
    assert str(torch.zeros(0, 3, device="npu")) == "tensor([], device='npu:0', size=(0, 3))"
    assert repr(torch.tensor([1.5], device="npu").half()) == "tensor([1.5000], device='npu:0', dtype=torch.float16)"
    assert f"{torch.tensor(2.0, device='npu'):.3f}" == "2.000"
    parameter = torch.nn.Parameter(torch.zeros(1, device="npu"))
    assert repr(parameter) == "Parameter containing:\ntensor([0.], device='npu:0', requires_grad=True)"
    for n, separator in ((40, " "), (36, "\n       ")):  # after the last line, or under it where it is full
        assert repr(torch.arange(n, device="npu")) == repr(torch.arange(n))[:-1] + f",{separator}device='npu:0')"


def test_modules_move_and_load():
    torch.manual_seed(0)
    cpu = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = torch.rand(3, 4)
    expected = cpu(x).detach()
    npu = copy.deepcopy(cpu).to("npu")
    assert all(isinstance(p, torch.nn.Parameter) and p.is_npu for p in npu.parameters())
    same(npu(x.npu()).detach(), expected)
    twin = copy.deepcopy(npu)
    twin[0].weight.data.zero_()
    assert npu[0].weight.cpu().abs().sum() > 0
    twin.load_state_dict(cpu.state_dict())
    same(twin(x.npu()).detach(), expected)
    assert twin.half()[0].weight.dtype == torch.float16 and twin[0].weight.is_npu
    assert torch.equal(npu.cpu()(x), expected)


def test_save_and_load():
    npu, cpu = torch.arange(6, device="npu").view(2, 3), torch.arange(4.0)
    file = io.BytesIO()
    torch.save({"npu": npu, "cpu": cpu}, file)
    for where, on in ((None, ("npu", "cpu")), ("cpu", ("cpu", "cpu")), ("npu", ("npu", "npu"))):
        file.seek(0)
        loaded = torch.load(file, map_location=where)
        assert (loaded["npu"].device.type, loaded["cpu"].device.type) == on
        assert loaded["npu"].tolist() == npu.tolist() and loaded["cpu"].tolist() == cpu.tolist()
    same(loaded["cpu"], cpu)
    loaded["cpu"][1:].zero_()
    assert loaded["cpu"].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_backward(mode):
    if torch.is_inference_mode_enabled():
        pytest.skip("no autograd in inference mode")
    grads = []
    for device in ("cpu", "npu"):
        x = torch.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
        y = x * 2
        y[:2].mul_(3)
        (y * y).sum().backward()
        grads.append(x.grad)
    same(grads[1], grads[0])


VIEWS = {
    "slice": lambda x: x[1:],
    "transpose": lambda x: x.t(),
    "view": lambda x: x.view(-1),
    "chunk": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unbind()[1],
    "detach": lambda x: x.detach(),
    "in_place": lambda x: x.t_(),
    "copy": lambda x: x * 2,
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_in_inference_mode_of_a_tensor_from_outside(name):
    """As a model's weights are, that was moved before."""
    with torch.inference_mode(False):
        npu, cpu = torch.arange(6.0, device="npu").view(3, 2), torch.arange(6.0).view(3, 2)
    with torch.inference_mode():
        npu, cpu = VIEWS[name](npu), VIEWS[name](cpu)
    same(npu, cpu)
    assert npu.is_inference() == cpu.is_inference() == (name == "copy")


SCALARS = {
    "tensor": lambda a, n: torch.tensor([a[0], a[1]]),
    "nested": lambda a, n: torch.tensor([[a[0], 2.0], [n[1], a[1]]]),
    "on_npu": lambda a, n: torch.tensor([n[0], n[1]], device=a.device),
    "as_tensor": lambda a, n: torch.as_tensor([a[0], a[1]]),
    "new_tensor": lambda a, n: a.new_tensor([n[0], n[1]]),
    "new_tensor_on_cpu": lambda a, n: torch.ones(1).new_tensor([n[0], a[1]]),
    "LongTensor": lambda a, n: torch.LongTensor([n[0], n[1]]),
    "FloatTensor": lambda a, n: torch.FloatTensor([a[0], a[1]]),
    "Tensor": lambda a, n: torch.Tensor([a[0], a[1]]),
    "stack": lambda a, n: torch.stack([a[0], a[1]]),
    "size": lambda a, n: torch.zeros(n[3], n[2]),
    "python": lambda a, n: torch.tensor([float(a[1]), int(n[2]), bool(n[0]), range(9)[n[3]]]),
}


@pytest.mark.parametrize("name", SCALARS)
def test_tensors_of_scalars(name):
    a, n = torch.arange(4.0) / 3, torch.arange(4)
    made, expected = SCALARS[name](a.npu(), n.npu()), SCALARS[name](a, n)
    assert made.device.type == ("npu" if name in ("on_npu", "new_tensor", "stack") else "cpu")
    same(made.npu(), expected)


def test_data_is_no_version_of_the_tensor():
    with torch.inference_mode(False):
        x = torch.ones(2, device="npu", requires_grad=True)
        y = (x * x).sum()
        x.data.add_(1)
        y.backward()
        assert x.grad.tolist() == [4.0, 4.0]


def test_default_device():
    with torch.device("npu"):
        assert torch.zeros(2).is_npu and torch.tensor([1]).is_npu and torch.nn.Linear(2, 2).weight.is_npu
    assert torch.zeros(2).is_cpu
