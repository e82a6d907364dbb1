"""The kernels where numbers are extreme: neighbours in a packed batch, tables of garbage, ties between ways of the plan."""

import dataclasses

import numpy as np
import pytest
import torch

import frontend_torch
from kernels_triton import interpreter, plan
from tests.interpret.test_variants import _few_heads_are_many, fresh_plans  # noqa: F401
from tests.support import check, make_case, run, same_bits
from tests.test_packed import TOKENS, packed_case, part, with_offsets
from tests.test_plan import problem

LENGTHS = (5, 0, 33, 1, 16)
SPOILED = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial", "dh", "dc_last", "dn_last", "dm_last")


@pytest.mark.parametrize("dtype, many", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("bad", [2, 4])
def test_bad_numbers_stay_in_their_packed_sequence(dtype, many, bad, monkeypatch):
    """An empty sequence's too: the token that it would read first is its neighbour's. many: the fused kernels."""
    if many:
        _few_heads_are_many(monkeypatch)
    case = packed_case(LENGTHS, H=2, dtype=dtype)
    clean = run("torch", case, "interpret", with_offsets(LENGTHS))
    start, stop = sum(LENGTHS[:bad]), sum(LENGTHS[: bad + 1])
    for value in (np.nan, np.inf):
        changed = {}
        for name in SPOILED:
            x = (case.arrays[name] if name in case.arrays else case.cotangents[name[1:]]).copy()
            if name.removeprefix("d") in TOKENS:
                x[:, start:stop] = value
            else:
                x[bad] = value
            changed[name] = x
        got = run("torch", case.replacing(**changed), "interpret", with_offsets(LENGTHS))
        ends = np.cumsum(LENGTHS)
        for s, length in enumerate(LENGTHS):
            if s != bad:
                own = ends[s] - length, ends[s]
                same_bits(part(clean, s, *own), part(got, s, *own))


MARGIN = 2**16


def test_no_table_leads_outside_the_tensors(monkeypatch):
    """Whatever a chunk table holds: nothing is written beside the outputs, forward and backward."""
    fences = []

    def fenced(shape, dtype):
        width = interpreter.WIDTHS[dtype]
        size = int(np.prod(shape, dtype=np.int64)) * width
        raw = np.full(size + 2 * MARGIN, 0xA5, np.uint8)
        fences.append((raw, size))
        inner = raw[MARGIN : MARGIN + size].reshape(*shape, width)
        return interpreter.HostArray(inner.ctypes.data, dtype, inner), inner

    monkeypatch.setattr(interpreter, "empty", fenced)
    case = packed_case(LENGTHS, H=2)
    T, N, L = sum(LENGTHS), len(LENGTHS), 16
    right = frontend_torch.make_chunk_table(torch.tensor([0, *np.cumsum(LENGTHS)]), T, L, backend="interpret").table
    rng = np.random.default_rng(0)
    limits = np.iinfo(np.int32)
    garbage = [
        rng.integers(limits.min, limits.max, len(right), dtype=np.int32),
        rng.integers(-3, 4 * T, len(right), dtype=np.int32),
        np.full(len(right), limits.max, np.int32),
        np.full(len(right), limits.min, np.int32),
        rng.permutation(right.numpy()),
    ]
    p = problem(1, 2, T, 16, 24, dtype="float32", chunk_size=L, layout="bthd")
    p = dataclasses.replace(p, sequences=N, has_table=True)
    forward, backward = plan.forward_pass(p), plan.backward_pass(p, None, True)
    given = case.arrays | {f"d{name}": x for name, x in case.cotangents.items()}
    for table in (right.numpy(), *garbage):
        arrays = {name: np.ascontiguousarray(x) for name, x in (given | {"chunks": table}).items()}
        for program in (forward, backward):
            hosts = {
                n: interpreter.HostArray(arrays[n].ctypes.data, arrays[n].dtype.name, arrays[n]) for n in program.inputs
            }
            made = interpreter.run(program, hosts)
            arrays |= {n: np.ascontiguousarray(x.view(program.spec(n).dtype)[..., 0]) for n, x in made.items()}
    assert fences
    for raw, size in fences:
        assert (raw[:MARGIN] == 0xA5).all() and (raw[MARGIN + size :] == 0xA5).all()


def test_the_last_maximum_may_lie_in_the_first_group_of_split_gates():
    """Its token gets what is left of the last stabiliser's cotangent, however many groups of chunks follow."""
    case = make_case(H=1, T=1060, chunk_size=16, f_mean=9.0)
    assert "gates_sums" in {x.name for x in plan.forward_pass(problem(1, 1, 1060, 16, 24, chunk_size=16)).launches}
    i = case.arrays["i"].copy()
    i[:, :, 100] = 20.0
    case = case.replacing(i=i)
    check(run("torch", case, "interpret"), case)


def test_the_recurrence_reads_each_gate_by_its_own_strides():
    case = make_case(B=2, H=3, T=5)
    got = run("torch", case, "interpret", operator="mlstm_recurrent")

    def strided(operator):
        def call(i, f, **arrays):
            gates = torch.stack([i, i, i], -1)  # (B, H, T, 3)
            return operator(i=gates[..., 0], f=f.transpose(0, 1).contiguous().transpose(0, 1), **arrays)

        return call

    same_bits(got, run("torch", case, "interpret", strided, operator="mlstm_recurrent"))


@pytest.mark.parametrize("closed", [20, 70])
def test_closed_gates_from_a_state_of_no_weight_in_the_fused_kernel(closed, monkeypatch):
    """Until a token counts there is no stabiliser; tiles of a chunk are taken one by one."""
    _few_heads_are_many(monkeypatch)
    options = {"K": 72, "V": 136, "dtype": "bfloat16"}
    launch = plan.forward_pass(problem(1, 2, 150, **options)).launches[-1]
    assert launch.name == "fused_forward" and launch.constexprs["BT"] < launch.constexprs["L"]
    case = make_case(T=150, **options)
    i = case.arrays["i"].copy()
    i[:, :, :closed] = -np.inf
    case = case.replacing(i=i, m_initial=np.full_like(case.arrays["m_initial"], -np.inf))
    like = case.replacing(i=np.maximum(i, -3000.0), m_initial=np.full_like(case.arrays["m_initial"], -3000.0))
    got = run("torch", case, "interpret")
    assert np.isfinite(got["h"]).all()
    check({n: got[n] for n in got}, case, like=like)


def test_cotangents_of_zeros_give_the_bits_of_none():
    """JAX hands zeros to the backward pass where only h is in the loss, PyTorch nothing."""
    case = make_case(T=70, K=17, dtype="bfloat16", chunk_size=16, f_mean=6.0, cotangents=("h",))
    case = case.but(return_last_states=True)
    same_bits(*(run(framework, case, "interpret") for framework in ("torch", "jax")))


def test_an_empty_sequence_with_gates_in_bfloat16():
    case = packed_case((0, 1), H=1, i_dtype="bfloat16", f_dtype="bfloat16", dtype="bfloat16")
    same_bits(*(run(framework, case, "interpret", with_offsets((0, 1))) for framework in ("torch", "jax")))
