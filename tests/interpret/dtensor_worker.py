"""What each of four processes does for test_dtensor.py: without JAX, which takes long to import."""

import copy
import datetime
import functools
import itertools

import torch
from torch import distributed

from frontend_torch import mlstm_chunkwise, mlstm_step
from tools.multi_gpu_torch import leave

WORLD = 4


def _tensors(B, layout="bhtd", states=True):
    """q, k, v, i, f and perhaps an initial state, of two heads with K = V = 4."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    tokens = [draw(B, 2, 20, *dims) for dims in ((4,), (4,), (4,), (), ())]
    tokens = [x.transpose(1, 2).contiguous() if layout == "bthd" else x for x in tokens]
    return tokens + ([draw(B, 2, 4, 4), draw(B, 2, 4), draw(B, 2)] if states else [])


def _dtensor(mesh):
    """Values and gradients as of one process, sharded as the inputs are, with no collective."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    for layout, states in itertools.product(("bhtd", "bthd"), (False, True)):
        heads = 1 if layout == "bhtd" else 2
        by_token, by_state = [Shard(0), Shard(heads)], [Shard(0), Shard(1)]
        placements = [by_token] * 5 + [by_state] * 3
        function = functools.partial(
            mlstm_chunkwise, layout=layout, chunk_size=16, backend="interpret", return_last_states=True
        )
        tensors = _tensors(2, layout, states)
        leaves = [
            x.requires_grad_()
            for x in (distribute_tensor(x, mesh, at) for x, at in zip(tensors, placements, strict=False))
        ]
        tensors = [x.requires_grad_() for x in tensors]
        h, last = function(*tensors)
        cotangents = [torch.randn(x.shape) for x in (h, *last)]
        expected = (h, *last, *torch.autograd.grad((h, *last), tensors, cotangents))
        cotangents = [distribute_tensor(x, mesh, at) for x, at in zip(cotangents, placements[4:], strict=True)]
        with CommDebugMode() as communication:
            h, last = function(*leaves)
            got = (h, *last, *torch.autograd.grad((h, *last), leaves, cotangents))
        assert communication.get_total_counts() == 0
        assert list(h.placements) == by_token and list(last[0].placements) == by_state
        assert all(torch.equal(x.full_tensor(), y) for x, y in zip(got, expected, strict=True))


def _elsewhere(mesh):
    """An axis that cannot be sharded is gathered first: right, if not cheap. A step and packed sequences shard alike."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    tensors = _tensors(1, "bthd")
    function = functools.partial(mlstm_chunkwise, layout="bthd", chunk_size=16, backend="interpret")
    by_length = [distribute_tensor(x, mesh, [Shard(1), Replicate()]) for x in tensors[:5]]
    assert torch.equal(function(*by_length).full_tensor(), function(*tensors[:5]))

    offsets = torch.tensor([0, 7, 20])
    by_head = [distribute_tensor(x, mesh, [Replicate(), Shard(2)]) for x in tensors[:5]]
    everywhere = distribute_tensor(offsets, mesh, [Replicate(), Replicate()])
    h = function(*by_head, cu_seqlens=everywhere)
    assert h.placements == (Replicate(), Shard(2))
    assert torch.equal(h.full_tensor(), function(*tensors[:5], cu_seqlens=offsets))

    step = [*(x[:, 0].expand(2, *x.shape[2:]).contiguous() for x in tensors[:5])]
    step += [x.expand(2, *x.shape[1:]).contiguous() for x in tensors[5:]]
    h, (c, *_) = mlstm_step(*(distribute_tensor(x, mesh, [Shard(0), Shard(1)]) for x in step), backend="interpret")
    expected, (c_expected, *_) = mlstm_step(*step, backend="interpret")
    assert list(h.placements) == [Shard(0), Shard(1)]
    assert torch.equal(h.full_tensor(), expected) and torch.equal(c.full_tensor(), c_expected)


class Layer(torch.nn.Module):
    """A layer around the operator."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gates = torch.nn.Linear(8, 24), torch.nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)) for y in self.qkv(x).chunk(3, -1))
        i, f = self.gates(x).chunk(2, -1)
        return mlstm_chunkwise(q, k, v, i, f + 3, layout="bthd", chunk_size=16, backend="interpret").flatten(2)


def _fully_sharded(rank):
    """A training step under FSDP2, each process with its part of the batch, is the step of one process."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    alone, x = Layer(), torch.randn(WORLD, 19, 8)
    before = copy.deepcopy(alone)
    sharded = fully_shard(copy.deepcopy(alone))
    alone(x).square().mean().backward()
    sharded(x[rank : rank + 1]).square().mean().backward()
    for model in (alone, sharded):
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    for x, y in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        moved = [(x - y).abs().max() for x, y in zip(before.parameters(), alone.parameters(), strict=True)]
    assert min(moved) > 1e-3


def work(rank, file):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)  # for a process that does not come to an exchange: an error, not a hang
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD, timeout=wait)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "heads"))
    torch.manual_seed(0)  # all have the same cotangents
    _dtensor(mesh)
    _elsewhere(mesh)
    _fully_sharded(rank)
    leave()
