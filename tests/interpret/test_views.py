"""PyTorch tensors are read where they lie: views cost no copy, forward or backward, and change no bit."""

import pytest
import torch

import frontend_torch.adapter
from frontend_torch import mlstm_chunkwise

B, H, T, K, V = 2, 3, 21, 8, 12


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def contiguous():
    return [random(B, H, T, K), random(B, H, T, K) + 0.1, random(B, H, T, V), random(B, H, T), random(B, H, T) + 2]


def projected(x):
    """As models make heads: a (B, H, T, D) view of (B, T, H, D) memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused(xs):
    """Slices of one projection's output."""
    q, k, v = (x.transpose(1, 2).reshape(B, T, -1) for x in xs[:3])
    whole = torch.cat([q, k, v], -1)
    parts = whole.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    views = [part.view(B, T, H, -1).transpose(1, 2) for part in parts]
    return [*views, *(projected(x) for x in xs[3:])]


def sliced(xs):
    """A part of longer sequences."""
    return [torch.cat([x, x], 2)[:, :, :T] for x in xs]


def every_other_head(xs):
    return [torch.stack([x, torch.zeros_like(x)], 2).flatten(1, 2)[:, ::2] for x in xs]


def expanded(xs):
    """One batch element, many times."""
    return [x[:1].expand(B, *x.shape[1:]) for x in xs]


VIEWS = {
    "projected": lambda xs: [projected(x) for x in xs],
    "fused": fused,
    "sliced": sliced,
    "every-other-head": every_other_head,
    "expanded": expanded,
}


@pytest.fixture
def seen(monkeypatch):
    """The tensors that each pass was executed on."""
    passes = []
    run = frontend_torch.adapter.run

    def recorded(program, tensors, backend, **others):
        passes.append(dict(tensors))
        return run(program, tensors, backend, **others)

    monkeypatch.setattr(frontend_torch.adapter, "run", recorded)
    return passes


def call(xs, dh):
    leaves = [x.detach().requires_grad_() for x in xs]
    h = mlstm_chunkwise(*leaves, chunk_size=16, backend="interpret")
    return [h, *torch.autograd.grad(h, leaves, dh)]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dh_view", [lambda x: x, projected], ids=["dh", "dh-projected"])
def test_views_are_read_in_place(name, dh_view, seen):
    xs = VIEWS[name](contiguous())
    dh = dh_view(random(B, H, T, V))
    got = call(xs, dh)
    forward, backward = seen
    pointers = {n: x.data_ptr() for n, x in zip("qkvif", xs, strict=True)}
    assert {n: forward[n].data_ptr() for n in pointers} == pointers
    assert {n: backward[n].data_ptr() for n in "qkvf"} == {n: pointers[n] for n in "qkvf"}
    assert backward["dh"].data_ptr() == dh.data_ptr()
    for x, y in zip(got, call([x.contiguous() for x in xs], dh.contiguous()), strict=True):
        assert torch.equal(x, y)


def test_last_axis_with_a_stride_is_copied(seen):
    xs = contiguous()
    strided = [torch.stack([x, x], -1)[..., 0] for x in xs]
    dh = random(B, H, T, V)
    for x, y in zip(call(strided, torch.stack([dh, dh], -1)[..., 0]), call(xs, dh), strict=True):
        assert torch.equal(x, y)
    assert all(seen[0][n].stride(-1) == 1 for n in "qkv")
    assert seen[0]["i"].data_ptr() == strided[3].data_ptr()  # gates are small: any stride is read


def test_expanded_cotangent():
    """What h.sum().backward() sends: one number with strides of 0."""
    xs = contiguous()
    one = torch.ones(())
    for x, y in zip(call(xs, one.expand(B, H, T, V)), call(xs, torch.ones(B, H, T, V)), strict=True):
        assert torch.equal(x, y)


def test_bthd_in_place(seen):
    xs = [x.transpose(1, 2).contiguous() for x in contiguous()]
    h = mlstm_chunkwise(*xs, layout="bthd", chunk_size=16, backend="interpret")
    assert h.shape == (B, T, H, V)
    assert h.is_contiguous()
    assert [seen[0][n].data_ptr() for n in "qkvif"] == [x.data_ptr() for x in xs]


def test_memory_order_follows_v():
    """Heads made as models make them come back so that merging them is free."""
    h = mlstm_chunkwise(*VIEWS["projected"](contiguous()), backend="interpret")
    assert h.transpose(1, 2).is_contiguous()
    assert mlstm_chunkwise(*contiguous(), backend="interpret").is_contiguous()
