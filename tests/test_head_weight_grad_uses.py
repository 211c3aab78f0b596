"""``weight_grad`` where it is used: compiled steps, memory, hooks, tied and computed weights."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from emulation import emulated
from head_cases import REDUCTIONS, Problem, dense, loss_of, options_of, problem
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import varstream as vs
from varstream.testing import assert_exact, peak_memory

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_kernel = pytest.mark.parametrize(
    "kernels",
    [nullcontext, pytest.param(emulated, marks=pytest.mark.emulated)],
    ids=["composed", "emulated"],
)


def upstream_of(loss):
    return torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape) + 0.3


def backward(loss):
    loss.backward(upstream_of(loss))


def gradients(loss, p):
    return torch.autograd.grad(loss, p.leaves, upstream_of(loss))


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("names", [(), ("smoothing", "z_loss", "class_weight")], ids=["plain", "z"])
@each_reduction
def test_compiled_whole(reduction, names, frozen):
    torch._dynamo.reset()
    p = problem(ignored=[3])
    options = options_of(p, names)
    wanted = gradients(dense(p, reduction, **options), p)
    if frozen:
        p.input.requires_grad_(False)
        p.bias.requires_grad_(False)

    def call(x, weight, bias, target, buffer):
        return vs.linear_cross_entropy(
            x, weight, target, linear_bias=bias, reduction=reduction, weight_grad=buffer, **options
        )

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    buffer = torch.zeros(23, 9, dtype=torch.float64)
    for times in (1, 2):
        loss = compiled(p.input, p.weight, p.bias, p.target, buffer)
        backward(loss)
        assert_exact(buffer, times * wanted[1])
    assert p.weight.grad is None
    if not frozen:
        assert_exact(p.input.grad, 2 * wanted[0])
        assert_exact(p.bias.grad, 2 * wanted[2])


def test_logprobs_compiled_whole():
    torch._dynamo.reset()
    p = problem(ignored=[3])
    plain = vs.token_logprobs(p.input, p.weight, p.target, return_entropy=True)
    wanted = gradients(
        sum((upstream_of(v) * v).sum() for v in plain), Problem(*p.leaves[:2], None, 0)
    )

    @torch.compile(backend="aot_eager", fullgraph=True)
    def total(x, weight, target, buffer):
        found = vs.token_logprobs(x, weight, target, return_entropy=True, weight_grad=buffer)
        return sum((upstream_of(v) * v).sum() for v in found)

    buffer = torch.zeros(23, 9, dtype=torch.float64)
    backward(total(p.input, p.weight, p.target, buffer))
    assert_exact(buffer, wanted[1])
    assert_exact(p.input.grad, wanted[0])


def test_nothing_recompiles_after_the_second_number_of_rows():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def call(x, weight, bias, target, buffer):
        return vs.linear_cross_entropy(
            x, weight, target, linear_bias=bias, weight_grad=buffer, max_rows=40
        )

    for rows in (16, 5, 9, 12, 33):
        p = problem(rows, ignored=[3])
        buffer = torch.zeros(23, 9, dtype=torch.float64)
        backward(call(p.input, p.weight, p.bias, p.target, buffer))
        assert_exact(buffer, gradients(p.dense_loss("mean"), p)[1])
    assert counter.frame_count <= 2


# --- memory ---------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Counts the tensors of ``numel`` elements that operators make anew."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            large = isinstance(made, torch.Tensor) and made.numel() >= self.numel
            if large and made.untyped_storage().data_ptr() not in given:
                self.names[func.name()] += 1
        return out


@each_reduction
def test_no_other_tensor_of_the_weights_size(reduction):
    p = problem(64, 16, 4000, dtype=torch.float32)
    with Made(p.weight.numel()) as plain:
        loss_of(p, reduction, chunk_size=8).sum().backward()
    assert plain.names
    buffer = torch.zeros_like(p.weight, requires_grad=False)
    with Made(p.weight.numel()) as made:
        loss_of(p, reduction, chunk_size=8, weight_grad=buffer).sum().backward()
    assert not made.names


@each_kernel
@each_reduction
def test_memory_stays_below_one_weight(kernels, reduction):
    p = problem(64, 64, 4000, dtype=torch.float32)
    buffer = torch.zeros_like(p.weight, requires_grad=False)

    def step(**options):
        loss_of(p, reduction, chunk_size=8, **options).sum().backward()
        p.weight.grad = p.input.grad = p.bias.grad = None

    with kernels():
        step(), step(weight_grad=buffer)  # what is made once
        plain, ours = peak_memory(step), peak_memory(lambda: step(weight_grad=buffer))
    assert plain > p.weight.nbytes > 2 * ours


# --- hooks, tied and computed weights -------------------------------------------------------------


@each_reduction
def test_hooks_on_the_weight(reduction):
    """As FSDP's and DDP's: once by autograd, and not at all where the buffer is the gradient."""
    p, fired = problem(), []
    p.weight.register_post_accumulate_grad_hook(lambda w: fired.append("after"))
    p.weight.register_hook(lambda grad: fired.append("before"))
    loss_of(p, reduction, chunk_size=5).sum().backward()
    assert fired == ["before", "after"]
    wanted = p.weight.grad.clone()
    p.weight.grad.zero_()
    loss_of(p, reduction, chunk_size=5, weight_grad=p.weight.grad).sum().backward()
    assert fired == ["before", "after"]
    assert_exact(p.weight.grad, wanted)


@each_reduction
@pytest.mark.parametrize("into_buffer", [False, True], ids=["autograd", "weight_grad"])
def test_weight_shared_with_an_embedding(reduction, into_buffer):
    """Autograd adds the embedding's part to the same ``.grad`` in place."""
    p, tokens = problem(bias=False), torch.randint(0, 23, (16,))
    fired = []
    p.weight.register_post_accumulate_grad_hook(lambda w: fired.append(w))

    def embedded():
        return torch.nn.functional.embedding(tokens, p.weight) * 0.5

    wanted = torch.autograd.grad(
        Problem(embedded(), p.weight, None, p.target).dense_loss(reduction).sum(), p.weight
    )[0]
    p.weight.grad = torch.zeros_like(p.weight)
    given = p.weight.grad
    options = {"weight_grad": given} if into_buffer else {}
    part = Problem(embedded(), p.weight, None, p.target)
    loss_of(part, reduction, chunk_size=5, **options).sum().backward()
    assert p.weight.grad is given and len(fired) == 1
    assert_exact(given, wanted)


@each_reduction
def test_low_rank_updates_of_the_weight(reduction):
    """LoRA: weight = W + B A with W frozen; the gradients go on to A and B by autograd."""
    p = problem(bias=False, ignored=[3])
    base = p.weight.detach()
    a = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    b = torch.randn(23, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for head in (lambda q: loss_of(q, reduction, chunk_size=5), lambda q: q.dense_loss(reduction)):
        loss = head(Problem(p.input, base + b @ a, None, p.target))
        results.append([loss, *torch.autograd.grad(loss, (p.input, a, b), upstream_of(loss))])
    for ours, theirs in zip(*results, strict=True):
        assert_exact(ours, theirs)


def test_low_rank_updates_from_a_buffer():
    """The buffer is the computed weight's gradient: the caller carries it on."""
    p = problem(bias=False)
    a = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    weight = p.weight.detach() + torch.randn(23, 2, dtype=torch.float64) @ a
    dense_loss = Problem(p.input, weight, None, p.target).dense_loss("mean")
    (wanted,) = torch.autograd.grad(dense_loss, a, retain_graph=True)
    buffer = torch.zeros_like(weight, requires_grad=False)
    loss_of(Problem(p.input, weight, None, p.target), weight_grad=buffer).backward()
    assert a.grad is None
    weight.backward(buffer)
    assert_exact(a.grad, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    p, buffer = problem(), torch.zeros(23, 9, dtype=torch.float64)
    wanted = gradients(p.dense_loss("mean"), p)[1]

    def head(x):
        return loss_of(Problem(x, p.weight, p.bias, p.target), weight_grad=buffer)

    backward(torch.utils.checkpoint.checkpoint(head, p.input, use_reentrant=reentrant))
    assert_exact(buffer, wanted)
