"""What reaches past one call on the emulated device: backward passes that raise, checkpoints, shared memory.

`test_emulation.py` runs this in a process of its own; pytest does not collect it by itself.
"""

import multiprocessing

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from advance_step.ascend import emulation

emulation.enable()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    grads = []
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.GELU()).to(device)
        x = torch.rand(3, 4).to(device).requires_grad_()
        checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
        grads.append([x.grad, block[0].weight.grad])
    for npu, cpu in zip(*grads, strict=True):
        assert npu.is_npu and cpu.abs().sum() > 0
        torch.testing.assert_close(npu.cpu(), cpu)


def test_random_state_is_forked():
    torch.manual_seed(0)
    with torch.random.fork_rng(device_type="npu"):
        first = torch.rand(3, device="npu")
    assert torch.rand(3, device="npu").tolist() == first.tolist()


def test_autocast_says_that_it_does_nothing():
    x = torch.ones(2, 2, device="npu")
    with pytest.warns(UserWarning, match="In npu autocast, but the target dtype is not supported"):
        context = torch.autocast("npu", dtype=torch.float16)
    with context:
        assert (x @ x).dtype == torch.float32


def hook(error):
    def raising(grad):
        raise error

    return raising


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.ones(3)  # on two devices


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("error", [ValueError("in the hook"), KeyboardInterrupt()], ids=repr)
def test_an_exception_in_a_backward_hook_reaches_the_caller(error, threads):
    x = torch.ones(3, device="npu", requires_grad=True)
    y = x * 2
    y.register_hook(hook(error))
    with torch.autograd.set_multithreading_enabled(threads), pytest.raises(type(error)) as caught:
        y.sum().backward()
    assert caught.value is error and x.grad is None
    (x * 2).sum().backward()  # and nothing of it is left
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_an_exception_in_a_backward_function_reaches_the_caller():
    x = torch.ones(3, device="npu", requires_grad=True)
    for run in (lambda y: y.backward(), lambda y: torch.autograd.grad(y, x)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            run(Failing.apply(x).sum())


def test_gradcheck():
    x = torch.rand(3, dtype=torch.float64, device="npu", requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: x.sin() * x, (x,))


def add_one(tensor):
    tensor.add_(1)


def answer(queue):
    tensor = queue.get()
    tensor.mul_(3)
    queue.task_done()


def test_shared_memory_is_shared_with_a_forked_process():
    x = torch.zeros(3, device="npu")
    assert not x.is_shared()
    assert x.share_memory_() is x and x.is_shared()
    child = multiprocessing.get_context("fork").Process(target=add_one, args=(x,))
    child.start()
    child.join(60)
    assert x.tolist() == [1.0, 1.0, 1.0]
    model = torch.nn.Linear(2, 2).npu()
    model.share_memory()
    assert all(p.is_shared() and p.is_npu for p in model.parameters())


def test_a_tensor_in_a_queue_is_the_senders_memory():
    x = torch.ones(3, device="npu")
    context = multiprocessing.get_context("fork")
    queue = context.JoinableQueue()
    child = context.Process(target=answer, args=(queue,))
    child.start()
    queue.put(x)
    queue.join()
    child.join(60)
    assert x.is_shared() and x.tolist() == [3.0, 3.0, 3.0]


def test_a_spawned_process_gets_the_device_with_the_tensor():
    x = torch.zeros(2, device="npu")
    child = multiprocessing.get_context("spawn").Process(target=torch.Tensor.fill_, args=(x, 4))
    child.start()
    child.join(120)
    assert (child.exitcode, x.tolist()) == (0, [4.0, 4.0])


def test_a_history_is_not_sent():
    y = torch.ones(3, device="npu", requires_grad=True) * 2
    with pytest.raises(RuntimeError, match=r"cannot be sent to another process: detach\(\) it first"):
        multiprocessing.reduction.ForkingPickler.dumps(y)
