"""What PyTorch's users rely on beyond numbers: grad modes, subsets of inputs and outputs, lifetimes."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.utils.checkpoint

from frontend_torch import mlstm_chunkwise, mlstm_step
from tests.support import INPUTS, OUTPUTS, make_case, named, run, same_bits, to_torch

SMALL = make_case(H=1, T=19, K=3, V=5, chunk_size=16)
SUBSETS = [names for size in range(1, 5) for names in itertools.combinations(OUTPUTS, size)]


def call(backend, leaves=INPUTS, case=SMALL):
    """The arguments and the outputs by name, with gradients for some inputs."""
    arrays = {name: to_torch(x.copy()) for name, x in case.arrays.items()}
    for name in leaves:
        arrays[name].requires_grad_()
    return arrays, named(mlstm_chunkwise(**arrays, backend=backend, **case.options))


def cotangents(names):
    return [to_torch(SMALL.cotangents[name]) for name in names]


# Gradients are linear in the cotangents: a subset's gradients are those with zeros for the rest.
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_every_subset_of_outputs(backend, names):
    arrays, outputs = call(backend)
    leaves = list(arrays.values())
    given = [outputs[name] for name in names]
    some = torch.autograd.grad(given, leaves, cotangents(names), allow_unused=True, retain_graph=True)
    filled = [x if name in names else torch.zeros_like(x) for name, x in zip(OUTPUTS, cotangents(OUTPUTS), strict=True)]
    full = torch.autograd.grad([outputs[name] for name in OUTPUTS], leaves, filled)
    for x, y in zip(some, full, strict=True):
        torch.testing.assert_close(torch.zeros_like(y) if x is None else x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [*((name,) for name in INPUTS), ("q", "i"), ("v", "f", "m_initial")], ids="-".join)
def test_gradients_of_some_inputs(backend, names):
    arrays, outputs = call(backend, names)
    depend = [name for name, x in outputs.items() if x.requires_grad]
    assert "h" in depend
    torch.autograd.backward([outputs[name] for name in depend], cotangents(depend))
    everything = run("torch", SMALL, backend)
    assert {name for name, x in arrays.items() if x.grad is not None} == set(names)
    got = {f"d{name}": x.grad.numpy() for name, x in arrays.items() if x.grad is not None}
    same_bits(got, {name: everything[name] for name in got})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    with mode():
        _, outputs = call(backend)
    assert not any(x.requires_grad for x in outputs.values())
    _, expected = call(backend)
    assert all(torch.equal(x, expected[name]) for name, x in outputs.items())


def test_plain_inputs_need_no_gradient(backend):
    _, outputs = call(backend, ())
    assert not any(x.requires_grad for x in outputs.values())


def test_h_alone_and_with_states_agree(backend):
    _, outputs = call(backend)
    _, h = call(backend, case=SMALL.but(return_last_states=False))
    assert torch.equal(h["h"], outputs["h"])


def test_backward_twice(backend):
    arrays, outputs = call(backend)
    leaves = list(arrays.values())
    first = torch.autograd.grad(outputs["h"].sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(outputs["h"].sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(outputs["h"].sum(), leaves)


def test_memory_is_released(backend):
    arrays, outputs = call(backend)
    alive = [weakref.ref(x) for x in (*arrays.values(), *outputs.values())]
    outputs["h"].sum().backward()
    del arrays, outputs
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_activation_checkpointing(backend):
    arrays, _ = call(backend)
    case = SMALL.but(return_last_states=False)

    def layer(*xs):
        return mlstm_chunkwise(*xs, backend=backend, **case.options)

    leaves = list(arrays.values())
    plain = torch.autograd.grad(layer(*leaves).sum(), leaves)
    h = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(h.sum(), leaves), plain, strict=True))


def _torch_step(case):
    token = [to_torch(case.arrays[name][:, :, 0].copy()) for name in ("q", "k", "v", "i", "f")]
    return token, [to_torch(case.arrays[f"{name}_initial"].copy()) for name in "cnm"]


def test_out_states(backend):
    """In place, into other memory, and into parts of one buffer: the same bits as new states."""
    token, state = _torch_step(make_case(T=1, B=2))
    h, want = mlstm_step(*token, *state, backend=backend)
    others = tuple(torch.full_like(x, 7.0) for x in state)
    both = tuple(torch.stack([x, x]) for x in state)
    copies = tuple(x.clone() for x in state)
    column = (*(x.clone() for x in state[:2]), state[2].clone()[..., None])
    for read, out in (
        (state, others),
        (copies, copies),
        ([x[0] for x in both], tuple(x[1] for x in both)),
        (column, column),
    ):
        versions = [x._version for x in out]
        h_out, got = mlstm_step(*token, *read, out_states=out, backend=backend)
        assert all(x is y for x, y in zip(got, out, strict=True))
        assert torch.equal(h, h_out) and all(torch.equal(x.view(y.shape), y) for x, y in zip(got, want, strict=True))
        assert all(x._version > y for x, y in zip(out, versions, strict=True))  # autograd is told of the change
    for name, bad, error in (
        ("out_states: expected three", others[:2], ValueError),
        (r"out_states\[0\]: expected shape", (others[1], others[1], others[2]), ValueError),
        (r"out_states\[0\]: expected dtype float32", (others[0].bfloat16(), *others[1:]), TypeError),
        (r"out_states\[1\]: expected a contiguous", (others[0], others[1].mT.contiguous().mT, others[2]), ValueError),
    ):
        with pytest.raises(error, match=name):
            mlstm_step(*token, *state, out_states=bad, backend=backend)
    with pytest.raises(ValueError, match="out_states: expected None while gradients are recorded"):
        mlstm_step(token[0].requires_grad_(), *token[1:], *state, out_states=others, backend=backend)
