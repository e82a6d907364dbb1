"""Packed sequences: each as if it were alone, of any length, in both frontends."""

import functools
import itertools

import array_api_compat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support import FRAMEWORKS, LAST, MODULES, Case, check, error, make_case, run, same_bits, to_torch, truth

pytestmark = pytest.mark.parametrize("framework", FRAMEWORKS)

TOKENS = ("q", "k", "v", "i", "f", "h")
LENGTHS = ((5, 0, 33, 1, 16), (40,), (0, 0, 1))


def packed_case(lengths, **options):
    """A call on packed sequences, without its offsets."""
    return make_case(**{"T": sum(lengths), "N": len(lengths), "layout": "bthd", "chunk_size": 16} | options)


def with_offsets(lengths, dtype=np.int64):
    """Makes the operator one of packed sequences."""
    offsets = np.array([0, *itertools.accumulate(lengths)], dtype)

    def via(operator):
        def packed(q, **arrays):
            is_torch = array_api_compat.is_torch_array(q)
            return operator(q=q, **arrays, cu_seqlens=torch.from_numpy(offsets) if is_torch else offsets)

        return packed

    return via


def alone(case, lengths):
    """Each sequence that has tokens as a case of its own, and its place."""
    for s, (start, stop) in enumerate(itertools.pairwise((0, *itertools.accumulate(lengths)))):
        if start < stop:
            own = [
                {n: np.ascontiguousarray(x[:, start:stop]) if n in TOKENS else x[s : s + 1] for n, x in group.items()}
                for group in (case.arrays, case.cotangents)
            ]
            yield s, start, stop, Case(*own, case.options)


def part(results, s, start, stop):
    """One sequence's share of the results."""
    return {n: x[:, start:stop] if n.removeprefix("d") in TOKENS else x[s : s + 1] for n, x in results.items()}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no-states"])
def test_one_by_one(framework, backend, lengths, states):
    """Against float64; on the kernels to the bit what each gives alone."""
    case = packed_case(lengths, states=states)
    got = run(framework, case, backend, with_offsets(lengths))
    for s, start, stop, own in alone(case, lengths):
        mine = part(got, s, start, stop)
        check(mine, own)
        if backend != "reference":
            same_bits(mine, run(framework, own, backend))


@pytest.mark.parametrize("options", [{}, {"input_gate": "sigmoid"}], ids=["exponential", "sigmoid"])
def test_an_empty_sequence_hands_its_state_on(framework, backend, options):
    case = packed_case((3, 0), H=1, **options)
    got = run(framework, case, backend, with_offsets((3, 0), np.int32))
    scale = np.exp(case.arrays["m_initial"][1] * bool(options))  # the sigmoid gate's m is 0
    for name in "cn":
        want = case.arrays[f"{name}_initial"][1] * scale
        assert error(got[f"{name}_last"][1], want.astype(np.float64)) <= 1e-6
    assert np.array_equal(got["m_last"][1], case.arrays["m_initial"][1] * (not options))
    assert error(got["dc_initial"][1], case.cotangents["c_last"][1].astype(np.float64) * scale) <= 1e-6


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"input_gate": "sigmoid", "normalize": False}], ids=str)
def test_variants(framework, backend, options):
    lengths = (17, 2)
    case = packed_case(lengths, H=1, **options)
    got = run(framework, case, backend, with_offsets(lengths))
    for s, start, stop, own in alone(case, lengths):
        check(part(got, s, start, stop), own)


BAD = {
    "start": ([1, 7], ValueError, r"cu_seqlens: expected offsets from 0 to T = 7, got 1 to 7"),
    "end": ([0, 6], ValueError, r"cu_seqlens: expected offsets from 0 to T = 7, got 0 to 6"),
    "order": ([0, 5, 3, 7], ValueError, r"cu_seqlens: expected offsets that never go down, got 5, 3 at sequence 1"),
    "short": ([7], ValueError, r"cu_seqlens: expected shape \(N \+ 1,\) of N >= 1 sequences, got \(1,\)"),
    "rank": ([[0, 7]], ValueError, r"cu_seqlens: expected shape \(N \+ 1,\)"),
    "dtype": (np.array([0, 7], np.float32), TypeError, r"cu_seqlens: expected dtype int32 or int64, got float32"),
}


def call(framework, case, backend, offsets, **changes):
    convert = to_torch if framework == "torch" else (lambda x: x)
    arrays = {n: convert(x) for n, x in case.arrays.items()}
    options = {**case.options, **changes}
    return MODULES[framework].mlstm_chunkwise(**arrays, **options, cu_seqlens=convert(offsets), backend=backend)


@pytest.mark.parametrize("offsets, kind, text", BAD.values(), ids=BAD)
def test_bad_offsets(framework, backend, offsets, kind, text):
    with pytest.raises(kind, match=text):
        call(framework, packed_case((7,), states=False), backend, np.array(offsets))


def test_bad_company(framework, backend):
    """Packed sequences need the layout and B = 1; states are one per sequence; a table needs its chunk size."""
    two = make_case(B=2, T=4, states=False, layout="bthd")
    with pytest.raises(ValueError, match="q: expected B = 1 with cu_seqlens, got B = 2"):
        call(framework, two, backend, np.array([0, 4]))
    with pytest.raises(ValueError, match="layout: expected 'bthd' with cu_seqlens, got 'bhtd'"):
        call(framework, make_case(T=4, states=False), backend, np.array([0, 4]))
    with pytest.raises(ValueError, match=r"c_initial: expected shape \(N, H, K, V\) = \(2, "):
        call(framework, packed_case((4,)), backend, np.array([0, 2, 4]))
    case = packed_case((4,), states=False)
    table = make_table(framework, backend, [0, 4], 4)
    with pytest.raises(ValueError, match="chunk_size: expected that of the chunk_table, 16, got None"):
        call(framework, case, backend, np.array([0, 4]), chunk_table=table, chunk_size=None)


def make_table(framework, backend, offsets, T, chunk_size=16):
    convert = torch.tensor if framework == "torch" else np.array
    return MODULES[framework].make_chunk_table(convert(offsets), T, chunk_size, backend=backend)


OTHERS = {  # what a table was made for, where the call has lengths (5, 0, 20) in chunks of 16
    "T": ([0, 5, 5, 26], 26, 16, r"chunk_table: expected one made for T = 25, got one for T = 26"),
    "chunk": ([0, 5, 5, 25], 25, 32, r"chunk_table: expected one made for chunk_size = 16, got one for 32"),
    "N": ([0, 5, 25], 25, 16, r"chunk_table: expected one made for N = 3 sequences, got one for N = 2"),
    "offsets": ([0, 6, 6, 25], 25, 16, r"cu_seqlens: expected the offsets of the chunk_table, 6 at 1, got 5"),
}


@pytest.mark.parametrize("offsets, T, chunk_size, text", OTHERS.values(), ids=OTHERS)
def test_a_table_of_another_call_is_refused(framework, backend, offsets, T, chunk_size, text):
    table = make_table(framework, backend, offsets, T, chunk_size)
    with pytest.raises(ValueError, match=text):
        call(framework, packed_case((5, 0, 20)), backend, np.array([0, 5, 5, 25]), chunk_table=table)


def test_a_raw_table_is_refused(framework, backend):
    table = make_table(framework, backend, [0, 4], 4).table
    with pytest.raises(TypeError, match=r"chunk_table: expected a ChunkTable \(of make_chunk_table\), got "):
        call(framework, packed_case((4,)), backend, np.array([0, 4]), chunk_table=table)


def test_offsets_that_change_after_the_table(framework, backend):
    """The table stays that of the old ones; with the new ones it is refused, though they are the same array."""
    case = packed_case((5, 3), H=1, states=False, cotangents=("h",))
    kind = torch.tensor if framework == "torch" else np.array
    offsets = kind([0, 5, 8])
    module = MODULES[framework]
    table = module.make_chunk_table(offsets, 8, 16, backend=backend)
    arrays = {n: to_torch(x) if framework == "torch" else x for n, x in case.arrays.items()}
    options = {**case.options, "backend": backend, "chunk_table": table}
    before = module.mlstm_chunkwise(**arrays, **options, cu_seqlens=offsets)
    offsets[1] = 4
    with pytest.raises(ValueError, match="cu_seqlens: expected the offsets of the chunk_table, 5 at 1, got 4"):
        module.mlstm_chunkwise(**arrays, **options, cu_seqlens=offsets)
    assert np.array_equal(np.asarray(before), np.asarray(module.mlstm_chunkwise(**arrays, **options)))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # the reference's
@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_offsets_that_only_the_device_sees(framework, backend, same):
    """Other offsets than the table's: nothing but NaN comes out, of the gradients too."""
    case = packed_case((9, 8), H=1, states=False, cotangents=("h",))
    table = make_table(framework, backend, [0, 9, 17] if same else [0, 8, 17], 17)
    offsets = np.array([0, 9, 17])
    arrays, dh = case.arrays, case.cotangents["h"]
    if framework == "torch":
        arrays, offsets, dh = {n: to_torch(x) for n, x in arrays.items()}, torch.tensor(offsets), to_torch(dh)
    function = functools.partial(MODULES[framework].mlstm_chunkwise, **case.options, backend=backend)

    def traced(offsets, table, arrays):
        return function(**arrays, cu_seqlens=offsets, chunk_table=table)

    if framework == "torch":
        torch._dynamo.reset()
        leaves = {n: x.requires_grad_() for n, x in arrays.items()}
        h = torch.compile(traced, fullgraph=True, backend="aot_eager")(offsets, table, leaves)
        got = [h.detach(), *torch.autograd.grad(h, leaves.values(), dh)]
    else:
        h, pullback = jax.vjp(lambda x: jax.jit(traced)(offsets, table, x), arrays)
        got = [h, *pullback(dh)[0].values()]
    assert all((np.isfinite(x) if same else np.isnan(x)).all() for x in map(np.asarray, got))


def test_chunk_table(framework, backend):
    """Given or made: the same bits."""
    lengths = (5, 0, 20)
    case = packed_case(lengths, H=1, states=False, cotangents=("h",))
    offsets = np.array([0, *itertools.accumulate(lengths)])
    given = to_torch(offsets) if framework == "torch" else jnp.asarray(offsets)
    table = MODULES[framework].make_chunk_table(given, 25, 16, backend=backend)
    assert (table.T, table.chunk_size, table.sequences) == (25, 16, 3)
    assert np.asarray(table.cu_seqlens).tolist() == offsets.tolist()
    raw = np.asarray(table.table)
    if backend != "reference":
        first, length, sequence = raw[: 3 * 4].reshape(3, 4)
        assert first[:4].tolist()[:1] + first[2:].tolist() == [0, 5, 21]
        assert (length.tolist(), sequence.tolist()) == ([5, 0, 16, 4], [0, 1, 2, 2])
        assert raw[12:].tolist() == [0, 1, 2, 4]
    via, expected = with_offsets(lengths), run(framework, case, backend, with_offsets(lengths))
    same_bits(expected, run(framework, case.but(chunk_table=table), backend, via))
    same_bits(expected, run(framework, case.but(chunk_table=table), backend))  # whose offsets are in it


@pytest.mark.parametrize("ids, want", [([3, 3, 7, 7, 7, 3], [0, 2, 5, 6]), ([4], [0, 1]), ([1, 1], [0, 2])])
def test_document_ids(framework, backend, ids, want):
    function = MODULES[framework].cu_seqlens_from_document_ids
    ids = torch.tensor(ids) if framework == "torch" else jnp.array(ids)
    T = len(ids)
    assert np.asarray(function(ids)).tolist() == want
    assert np.asarray(function(ids[None])).tolist() == want
    assert np.asarray(function(ids, len(want) + 2)).tolist() == [*want, T, T, T]
    assert np.asarray(function(ids, 1)).tolist() == [0, T]
    assert function(ids).dtype in (torch.int32, jnp.int32)
    with pytest.raises(ValueError, match=r"ids: expected shape \(T,\) or \(1, T\)"):
        function(ids[None, None])
    with pytest.raises(ValueError, match="num_documents: expected an int >= 1, got 0"):
        function(ids, 0)


def test_a_sequence_does_not_see_its_neighbours(framework, backend):
    """Not even their bad numbers."""
    lengths = (18, 3, 20)
    case = packed_case(lengths, H=1)
    spoilt = {n: x.copy() for n, x in case.arrays.items() if n in TOKENS}
    for x in spoilt.values():
        x[:, 18:21] = np.nan
    via = with_offsets(lengths)
    clean, got = run(framework, case, backend, via), run(framework, case.replacing(**spoilt), backend, via)
    for s, start, stop, _ in alone(case, lengths):
        if s != 1:
            same_bits(part(clean, s, start, stop), part(got, s, start, stop))
    assert np.isnan(got["h"][:, 18:21]).all()


def test_the_readable_truth_of_each(framework, backend):
    """The two ends of the chain: one packed call, float64 of its second sequence alone."""
    case = packed_case((2, 9), H=1)
    (*_, (s, start, stop, own)) = alone(case, (2, 9))
    got = part(run(framework, case, backend, with_offsets((2, 9))), s, start, stop)
    true = truth(own)
    assert all(error(got[name], true[name]) <= 3e-5 for name in ("h", *LAST))
