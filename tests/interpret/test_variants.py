"""Variants of the plan that shapes and options choose: each against float64, torch and JAX to the bit."""

import dataclasses

import numpy as np
import pytest
import torch

import frontend_torch
from kernels_triton import builder, config, plan
from kernels_triton.kernels.segments import FOLLOW, ONE
from kernels_triton.launch_builder import LaunchBuilder
from kernels_triton.problem import Problem, suits_descriptors
from tests.support import make_case, run, same_bits
from tests.test_packed import alone, packed_case, part, with_offsets
from tests.test_plan import problem
from tools import compare
from tools.cases import Case
from tools.parity import check_case

# A case, and a kernel that its plan must launch. Fused: with two heads counting as many.
STATES = {"initial": True, "last": True}
VARIANTS = (
    (Case("split-gates", B=1, H=1, T=1060, K=16, V=16, chunk_size=16, **STATES), "gates_sums"),
    (Case("fused-wide", B=1, H=2, T=300, K=72, V=136, dtype="bfloat16", **STATES), "fused_forward"),
    (Case("fused-segments", B=1, H=1, T=560, K=24, V=72, dtype="bfloat16", chunk_size=16, **STATES), "fused_forward"),
    (Case("fused", B=1, H=2, T=150, K=16, V=24, dtype="bfloat16", **STATES), "fused_backward"),
    (
        Case("fused-recomputed", B=1, H=2, T=150, K=16, V=24, dtype="bfloat16", save_states=False, **STATES),
        "fused_backward",
    ),
    *(
        (Case(f"{name}-sigmoid-{plain}", input_gate="sigmoid", normalize=not plain, **case, **STATES), kernel)
        for name, case, kernel in (
            ("fused", {"H": 2, "T": 150, "K": 16, "V": 24, "dtype": "bfloat16"}, "fused_backward"),
            ("fused-wide", {"H": 1, "T": 150, "K": 16, "V": 136, "dtype": "bfloat16"}, "fused_forward"),
            ("segments", {"H": 1, "T": 560, "K": 16, "V": 16, "chunk_size": 16}, "gates_sums"),
        )
        for plain in (False, True)
    ),
    (Case("segments-bf16", B=1, H=1, T=560, K=16, V=24, dtype="bfloat16", chunk_size=16, **STATES), "state_scan"),
    (Case("recomputed", B=1, H=2, T=150, K=16, V=24, save_states=False, **STATES), "chunk_backward"),
    (Case("four-tiles", B=1, H=1, T=300, K=16, V=16, dtype="bfloat16", chunk_size=256, **STATES), "chunk_backward"),
)


def make(shape, dtype, seed=0):
    B, H, T, K, V = shape
    rng = np.random.default_rng(seed)
    shapes = ((B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, T), (B, H, T), (B, H, K, V), (B, H, K), (B, H))
    arrays = [torch.from_numpy(rng.standard_normal(s, dtype=np.float32)) for s in shapes]
    arrays[4] = arrays[4] + 3
    cotangents = [torch.from_numpy(rng.standard_normal(s, dtype=np.float32)) for s in (shapes[2], *shapes[5:])]
    half = getattr(torch, dtype)
    return [x.to(half) for x in arrays[:3]] + arrays[3:], [cotangents[0].to(half), *cotangents[1:]]


def by_torch(arrays, cotangents, **options):
    leaves = [x.detach().requires_grad_() for x in arrays]
    h, last = frontend_torch.mlstm_chunkwise(*leaves, return_last_states=True, **options)
    outputs = [h, *last]
    return outputs + list(
        torch.autograd.grad(outputs, leaves, [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)])
    )


def _clear_plans():
    plan.forward_pass.cache_clear()
    plan.backward_pass.cache_clear()


def _few_heads_are_many(monkeypatch, programs=1):
    """programs: of a fused kernel that the GPU would run at once."""
    monkeypatch.setattr(config, "MANY_HEADS", 2)
    monkeypatch.setattr(config, "SIDE_BY_SIDE", programs)
    _clear_plans()


@pytest.mark.parametrize("case, kernel", VARIANTS, ids=lambda x: getattr(x, "name", ""))
def test_variant(case, kernel, monkeypatch):
    if "fused" in case.name:
        _few_heads_are_many(monkeypatch, programs=4 if "segments" in case.name else 1)
    p = problem(case.B, case.H, case.T, case.K, case.V, dtype=case.dtype, chunk_size=case.chunk_size)
    assert kernel in {x.name for ps in (plan.forward_pass(p), plan.backward_pass(p)) for x in ps.launches}
    scans = [x.constexprs["SEGMENTS"] for x in plan.forward_pass(p).launches if x.name == "state_scan"]
    assert scans == [1, 2] or not case.name.startswith(("segments", "split"))
    assert scans == [1] or not case.name.startswith("fused-segments")
    result = check_case(case)
    assert result.status == "ok", [(row.tensor, row.identical, row.errors, row.tolerance) for row in result.rows]


@pytest.mark.parametrize(
    "lengths, H, V, chunk_size, programs",
    [((150, 0, 100), 2, 24, None, 1), ((150, 0, 100), 1, 136, None, 1), ((530, 0, 40), 1, 72, 16, 4)],
)
def test_packed_fused_has_the_bits_of_one_alone(lengths, H, V, chunk_size, programs, monkeypatch):
    """Of one tile of values, of several, and in segments; the last chunk is cut within and after its first half."""
    _few_heads_are_many(monkeypatch, programs)
    case = packed_case(lengths, H=H, K=16, V=V, dtype="bfloat16", chunk_size=chunk_size)
    p = problem(1, H, lengths[0], 16, V, dtype="bfloat16", chunk_size=chunk_size)
    launches = plan.forward_pass(p).launches
    assert launches[-1].name == "fused_forward" and launches[-1].constexprs["SEGMENTS"] == (
        FOLLOW if programs > 1 else ONE
    )
    packed = run("torch", case, "interpret", with_offsets(lengths))
    for s, start, stop, own in alone(case, lengths):
        same_bits(part(packed, s, start, stop), run("torch", own, "interpret"))
    same_bits(packed, run("jax", case, "interpret", with_offsets(lengths)))


@pytest.mark.parametrize("packed", [False, True])
def test_dv_of_two_tiles_has_the_bits_of_one(packed, monkeypatch):
    """`Tile.span`, which a table chooses by a tile's last number."""
    lengths = (90, 0, 50)
    options = {"N": len(lengths), "layout": "bthd"} if packed else {}
    case = make_case(H=1, T=sum(lengths), K=16, V=72, dtype="bfloat16", **options)
    entries = [x for x in config.table("sm_90") if "bfloat16" in x["dtypes"]]
    found = []
    for span in (1, 2):
        changed = [x | {"backward": [*(*x["backward"], 1)[:7], span], "L": 128} for x in entries]
        monkeypatch.setattr(config, "table", lambda arch, changed=changed: changed)
        _clear_plans()
        launches = plan.backward_pass(problem(1, 1, 140, 16, 72, dtype="bfloat16")).launches
        assert [x.constexprs["SPAN"] for x in launches if "SPAN" in x.constexprs] == [span]
        via = with_offsets(lengths) if packed else None
        found.append([run(framework, case, "interpret", via) for framework in ("torch", "jax")])
    for x, y in zip(*found, strict=True):
        same_bits(x, y)
    same_bits(*found[1])


def test_gates_in_two_launches_and_scans_in_segments_when_packed(monkeypatch):
    """Packed sequences that are long enough: the same bits as alone. Gates in one launch: the same bits as in two."""
    lengths = (530, 40)  # with chunks of 16, from 512 tokens on
    case = packed_case(lengths, H=1, K=16, V=16)
    packed = run("torch", case, "interpret", with_offsets(lengths))
    for s, start, stop, own in alone(case, lengths):
        same_bits(part(packed, s, start, stop), run("torch", own, "interpret"))
    split = run("torch", own := next(alone(case, lengths))[3], "interpret")
    names = {x.name for x in plan.forward_pass(problem(1, 1, 530, 16, 16, chunk_size=16)).launches}
    assert {"gates_sums", "state_scan"} <= names
    monkeypatch.setattr(builder, "MANY_HEADS", 0)
    _clear_plans()
    same_bits(split, run("torch", own, "interpret"))


def test_no_gradient_no_states():
    """Inference keeps no states, and gives the same bits."""
    arrays, _ = make((1, 2, 100, 16, 16), "float32")
    with torch.no_grad():
        h = frontend_torch.mlstm_chunkwise(*arrays, backend="interpret")
    again = frontend_torch.mlstm_chunkwise(*[x.requires_grad_() for x in arrays], backend="interpret")
    assert torch.equal(h, again)
    p = problem()
    assert "states" not in plan.forward_pass(p, False).results
    assert "states" in plan.forward_pass(p).results


def widened(x):
    return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() >= 4 else x


def narrowed(x):
    return x.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("pack, unpack", [(narrowed, lambda x: x), (lambda x: x, widened)], ids=["narrowed", "widened"])
def test_saved_tensors_may_come_back_in_other_memory(pack, unpack):
    """As offloading brings them: strides are those of the tensors at hand, not of the forward pass."""
    arrays, cotangents = make((1, 2, 70, 16, 16), "float32")
    wide = [widened(x) for x in arrays]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        moved = by_torch(wide, cotangents, backend="interpret")
    for x, y in zip(moved, by_torch(wide, cotangents, backend="interpret"), strict=True):
        assert torch.equal(x, y)


def test_descriptors_need_alignment():
    shape = (2, 4, 100, 64)
    assert suits_descriptors(shape, (25600, 6400, 64, 1), 2, 0)
    assert not suits_descriptors(shape, (25600, 6400, 64, 1), 2, 8)  # the address
    assert not suits_descriptors(shape, (0, 6400, 64, 1), 2, 0)  # broadcast
    assert not suits_descriptors(shape, (25600, 6400, 65, 1), 2, 0)  # a stride
    assert not suits_descriptors((2, 4, 100, 60), (24000, 6000, 60, 1), 2, 0)  # 120 bytes


def test_descriptors_change_operands_alone():
    p = dataclasses.replace(problem(1, 4, 4096, 128, 256, dtype="bfloat16"), descriptors=True)
    assert isinstance(p, Problem)
    plain = dataclasses.replace(p, descriptors=False)
    assert LaunchBuilder(p).config == LaunchBuilder(plain).config
    for make_pass in (plan.forward_pass, plan.backward_pass):
        for x, y in zip(make_pass(p).launches, make_pass(plain).launches, strict=True):
            assert (x.name, list(x.operands), x.outputs) == (y.name, list(y.operands), y.outputs)
            assert x.grid == y.grid
            different = {name for name in x.constexprs if x.constexprs[name] != y.constexprs[name]}
            assert different <= {"SOURCE"}


@pytest.fixture(autouse=True)
def fresh_plans():
    """Plans made under another configuration do not outlive their test."""
    yield
    _clear_plans()


def test_float16_with_a_small_normaliser():
    """Queries that hardly see the state: weights 1 / d beyond what float16 holds, in the backward scan too."""
    case = make_case(H=1, T=40, dtype="float16", states=False, cotangents=("h",), i_mean=14.0, chunk_size=16)
    q, k, dh = (x.copy() for x in (case.arrays["q"], case.arrays["k"], case.cotangents["h"]))
    q[..., 1:] *= 1e-5
    k[..., 0] = 0
    case = dataclasses.replace(case, arrays={**case.arrays, "q": q, "k": k}, cotangents={"h": dh * np.float16(1e-4)})
    found, expected = run("torch", case, "interpret"), run("torch", case, "reference")
    for name, x in expected.items():
        assert np.isfinite(found[name]).all(), name
        assert compare.frobenius_error(found[name], x.astype(np.float64)) < 5e-3, name
    same_bits(found, run("jax", case, "interpret"))


def test_float16_where_the_loss_is_on_the_last_token():
    """What the initial state gets is then small, but no less exact."""
    case = make_case(H=1, T=64, dtype="float16", cotangents=("h",), f_mean=1.0, chunk_size=64)
    dh = case.cotangents["h"] * 0
    dh[:, :, -1] = case.cotangents["h"][:, :, -1]
    case = dataclasses.replace(case, cotangents={"h": dh})
    found, expected = run("torch", case, "interpret"), run("torch", case, "reference")
    assert 0 < np.abs(expected["dc_initial"]).max() < 1e-5
    assert compare.frobenius_error(found["dc_initial"], expected["dc_initial"].astype(np.float64)) < 2e-3
