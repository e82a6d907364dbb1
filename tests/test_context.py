"""A sequence split over devices: what is refused, and the operations of the exchange by themselves."""

import functools

import jax
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from torch import distributed

import frontend_jax
import frontend_torch
from kernels_triton import context
from tests.support import make_case, to_torch
from tests.test_plan import problem

CASE = make_case(B=2, H=3, T=5, K=4, V=6)
TORCH = {name: to_torch(x) for name, x in CASE.arrays.items()}


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_torch_without_processes():
    with pytest.raises(ValueError, match=r"group: expected torch\.distributed to be initialised .*, got none"):
        frontend_torch.mlstm_context_parallel(**TORCH)


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"group": "seq"}, TypeError, r"group: expected a ProcessGroup that this process is in, .*, got str"),
        ({"group": distributed.GroupMember.NON_GROUP_MEMBER}, TypeError, r"group: expected .* got .*"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens: expected None, as packed .*, got Tensor"),
        ({"k": TORCH["k"][..., :2]}, ValueError, r"k: expected shape \(B, H, T, K\) = \(2, 3, 5, 4\), got"),
    ],
)
def test_torch_refuses(group, changes, kind, text):
    with pytest.raises(kind, match=text):
        frontend_torch.mlstm_context_parallel(**{**TORCH, **changes})


def test_torch_takes_a_mesh_of_one_dimension(group):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("batch", "tokens"))
    with pytest.raises(ValueError, match=r"group: expected a DeviceMesh of one dimension, got 2"):
        frontend_torch.mlstm_context_parallel(**TORCH, group=mesh)


@pytest.mark.parametrize("last", [False, True])
def test_torch_alone_is_the_operator(group, last):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("tokens",))
    for of in (None, mesh):
        got = frontend_torch.mlstm_context_parallel(**TORCH, group=of, return_last_states=last)
        expected = frontend_torch.mlstm_chunkwise(**TORCH, return_last_states=last)
        for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            assert torch.equal(x, y)


MESH = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({}, ValueError, r"axis: expected an axis of the mesh inside shard_map, or mesh=, got 'seq'"),
        ({"axis": 0}, TypeError, r"axis: expected the name of a mesh axis, got int"),
        ({"batch_axis": "data"}, ValueError, r"batch_axis: expected None without mesh, got 'data'"),
        ({"mesh": MESH, "axis": "tokens"}, ValueError, r"axis: expected one of 'seq', got 'tokens'"),
        ({"mesh": MESH, "head_axis": "model"}, ValueError, r"head_axis: expected one of 'seq', got 'model'"),
        ({"mesh": MESH, "head_axis": "seq"}, ValueError, r"axis, batch_axis, head_axis: expected different axes"),
        ({"cu_seqlens": np.array([0, 5])}, ValueError, r"cu_seqlens: expected None, as packed .*, got ndarray"),
        ({"mesh": MESH, "f": CASE.arrays["f"][:, :, 1:]}, ValueError, r"f: expected shape \(B, H, T\) = \(2, 3, 5\)"),
    ],
)
def test_jax_refuses(changes, kind, text):
    with pytest.raises(kind, match=text):
        frontend_jax.mlstm_context_parallel(**{**CASE.arrays, "axis": "seq", **changes})


def test_jax_refuses_what_cannot_be_split():
    mesh = jax.sharding.AbstractMesh((2,), ("seq",))
    with pytest.raises(ValueError, match=r"q: expected T divisible by the 2 devices of axis, got 5"):
        frontend_jax.mlstm_context_parallel(**CASE.arrays, axis="seq", mesh=mesh)


def test_jax_alone_is_the_operator():
    names = tuple(CASE.arrays)
    call = functools.partial(frontend_jax.mlstm_context_parallel, axis="seq", return_last_states=True)
    tokens = (P(None, None, "seq"),) * 5
    inside = jax.shard_map(
        lambda *x: call(**dict(zip(names, x, strict=True))),
        mesh=MESH,
        in_specs=(*tokens, *(P(),) * 3),
        out_specs=(tokens[0], (P(),) * 3),
    )
    expected = frontend_jax.mlstm_chunkwise(**CASE.arrays, return_last_states=True)
    for got in (inside(*CASE.arrays.values()), call(**CASE.arrays, mesh=MESH)):
        for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [int, np.int64], ids=["known to the host", "an array's"])
def test_what_a_later_segment_holds_does_not_matter(number):
    """NaN or a state beyond all measure: no weight, no trace."""
    p, P, head = problem(B=1, H=2, K=3, V=4), 3, (1, 2)
    rng = np.random.default_rng(0)
    own = rng.standard_normal((P, *head, 3 * 4 + 3 + 2)).astype(np.float32)
    first = tuple(rng.standard_normal((*head, *dims)).astype(np.float32) for dims in ((3, 4), (3,), ()))
    states = [context.state_before(p, own, first, number(index))[0] for index in range(P)]
    for x, y in zip(states[0], first, strict=True):
        np.testing.assert_array_equal(x, y)
    own[1:] = np.nan
    for x, y in zip(context.state_before(p, own, first, number(1))[0], states[1], strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isnan(context.state_before(p, own, first, number(2))[0][0]).all()


@pytest.mark.parametrize("last", [False, True], ids=["h alone", "states"])
@pytest.mark.parametrize("input_gate", ["exponential", "sigmoid"])
def test_an_index_the_host_knows_gives_the_same(input_gate, last):
    """Sums in another order, over the segments that count alone."""
    p, P, head = problem(B=1, H=2, K=3, V=4, input_gate=input_gate), 5, (1, 2)
    rng = np.random.default_rng(1)

    def draw(*dims):
        return rng.standard_normal((*dims,)).astype(np.float32)

    first = draw(*head, 3, 4), draw(*head, 3), draw(*head)
    forward, backward = draw(P, *head, 3 * 4 + 3 + 2), draw(P, *head, 3 * 4 + 3 + 3)
    backward[..., -1] = rng.integers(0, 2, (P, *head))
    own = (draw(*head, 3, 4), draw(*head, 3), draw(*head)) if last else None
    for index in range(P):
        states = [context.state_before(p, forward, first, number(index)) for number in (int, np.int64)]
        decays = states[0][1]
        cotangents = [
            context.cotangent_after(p, backward, decays, draw(*head) * 0 - 1, own, number(index))
            for number in (int, np.int64)
        ]
        for x, y in (states, cotangents):
            for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_small_decays_after_large_ones():
    """Sums of the segments' log f, each of its own terms: a difference of prefix sums would lose the last one."""
    p = problem(B=1, H=1, K=1, V=1)
    own = np.zeros((4, 1, 1, 4), np.float32)
    own[1, ..., 0], own[:, 0, 0, 3] = 1.0, (-1e7, -1e7, -0.3, -0.4)
    zeros = tuple(np.zeros((1, 1, *dims), np.float32) for dims in ((1, 1), (1,), ()))
    for index in (3, np.int64(3)):
        (c, _, m), _ = context.state_before(p, own, zeros, index)
        np.testing.assert_allclose(c * np.exp(m), np.exp(-0.3), rtol=1e-6)
