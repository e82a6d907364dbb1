"""Packed sequences, on the kernels; and what only their plans can show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import frontend_jax
from kernels_triton import plan
from tests.support import run
from tests.test_packed import *  # noqa: F403
from tests.test_packed import packed_case, with_offsets
from tests.test_packed import pytestmark as pytestmark


def test_other_lengths_compile_nothing(framework, backend):
    """Offsets are data: JAX traces once for any lengths, and no launch depends on them."""
    case = packed_case((9, 8), H=1, states=False, cotangents=("h",))
    if framework == "torch":
        plan.forward_pass.cache_clear()
        for lengths in ((9, 8), (17, 0), (2, 15)):
            run(framework, case, backend, with_offsets(lengths))
        assert plan.forward_pass.cache_info().misses == 1
        return
    traced = []

    @jax.jit
    def f(arrays, offsets):
        traced.append(None)
        return frontend_jax.mlstm_chunkwise(**arrays, **case.options, cu_seqlens=offsets, backend=backend)

    for lengths in ((9, 8), (17, 0), (2, 15)):
        offsets = np.array([0, lengths[0], 17], np.int32)
        h = f(case.arrays, jnp.asarray(offsets))
        assert np.array_equal(h, run(framework, case, backend, with_offsets(lengths))["h"])
    assert len(traced) == 1


@pytest.mark.parametrize("offsets", [[0, 40, -3, 17], [-5, 90, 2, 3], [0, 2**31 - 1, 0, 17], [17, 17, 17, 0]])
def test_bad_offsets_stay_inside(framework, backend, offsets):
    """Offsets that the host did not see: wrong results perhaps, but no token or chunk out of range."""
    table = (
        torch.ops.mlstm_dual.chunk_table(torch.tensor(offsets), 17, 16, backend)
        if framework == "torch"
        else frontend_jax.make_chunk_table(jnp.array(offsets, jnp.int32), 17, 16, backend=backend).table
    )
    NT = 17 // 16 + 3
    table = np.asarray(table)
    first, length, sequence = table[: 3 * NT].reshape(3, NT)
    assert ((first >= 0) & (first < 17) & (length >= 0) & (length <= 16) & (first + length <= 17)).all()
    assert ((sequence >= -1) & (sequence < 3)).all()
    starts = table[3 * NT :]
    assert ((starts >= 0) & (starts <= NT) & (np.diff(starts, prepend=0) >= 0)).all()
