"""What only JAX's callers can get wrong: the argument is named, what was expected, and what came."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frontend_jax import make_chunk_table, mlstm_chunkwise, mlstm_context_parallel, mlstm_recurrent, mlstm_step
from tests.support import make_case

ARRAYS = {name: jnp.asarray(x) for name, x in make_case(B=2, H=3, T=5, K=4, V=6).arrays.items()}
PACKED = {name: x[:1].swapaxes(1, 2) for name, x in list(ARRAYS.items())[:5]} | {"layout": "bthd"}  # T = 5
STEP = dict(zip("qkvifcnm", (x[:, :, 0] if n < 5 else x for n, x in enumerate(ARRAYS.values())), strict=True))
STRUCT = jax.ShapeDtypeStruct((2, 3, 5, 4), jnp.float32)
OFFSETS = np.array([0, 5])
MESH = jax.make_mesh((1,), ("t",))
split = functools.partial(mlstm_context_parallel, axis="t", mesh=MESH)
whole = functools.partial(make_chunk_table, T=5, chunk_size=16)

# (function, its good arguments, what to change, the error, its text)
BAD = {
    "offsets-and-a-list": (
        mlstm_chunkwise,
        PACKED,
        {"cu_seqlens": OFFSETS, "q": [1.0]},
        TypeError,
        "q: expected a jax.Array, got list",
    ),
    "offsets-and-rank-1": (
        mlstm_chunkwise,
        PACKED,
        {"cu_seqlens": OFFSETS, "q": jnp.zeros(3)},
        ValueError,
        "q: expected rank 4, (B, T, H, K), got shape (3,)",
    ),
    "complex-offsets": (
        mlstm_chunkwise,
        PACKED,
        {"cu_seqlens": OFFSETS + 0j},
        TypeError,
        "cu_seqlens: expected dtype int32 or int64, got complex64",
    ),
    "short-offsets": (
        mlstm_chunkwise,
        PACKED,
        {"cu_seqlens": OFFSETS - [0, 1]},
        ValueError,
        "cu_seqlens: expected offsets from 0 to T = 5, got 0 to 4",
    ),
    "short-table": (
        whole,
        {},
        {"cu_seqlens": OFFSETS - [0, 1]},
        ValueError,
        "cu_seqlens: expected offsets from 0 to T = 5, got 0 to 4",
    ),
    "mesh": (split, ARRAYS, {"mesh": "x"}, TypeError, "mesh: expected a jax.sharding.Mesh or None, got str"),
    "struct": (mlstm_chunkwise, ARRAYS, {"q": STRUCT}, TypeError, "q: expected a jax.Array, got ShapeDtypeStruct"),
    "struct-recurrent": (
        mlstm_recurrent,
        ARRAYS,
        {"k": STRUCT},
        TypeError,
        "k: expected a jax.Array, got ShapeDtypeStruct",
    ),
    "struct-step": (mlstm_step, STEP, {"c": STRUCT}, TypeError, "c: expected a jax.Array, got ShapeDtypeStruct"),
    "struct-split": (split, ARRAYS, {"v": STRUCT}, TypeError, "v: expected a jax.Array, got ShapeDtypeStruct"),
    "key": (
        mlstm_chunkwise,
        ARRAYS,
        {"i": jax.random.split(jax.random.key(0), (2, 3, 5))},
        TypeError,
        "i: expected dtype",
    ),
    "objects": (mlstm_chunkwise, ARRAYS, {"f": np.zeros((2, 3, 5), object)}, TypeError, "f: expected dtype"),
}
for value, kind in (("no", "str"), (2, "int"), (None, "NoneType"), (jnp.array(True), "ArrayImpl")):
    for function in (mlstm_chunkwise, mlstm_recurrent, split):
        name = getattr(function, "__name__", "split")
        text = f"return_last_states: expected a bool, got {kind}"
        BAD[f"flag-{kind}-{name}"] = (function, ARRAYS, {"return_last_states": value}, TypeError, text)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    def launched(*_, **__):
        raise AssertionError("something was executed")

    for place in ("operator.kernels_call", "operator.reference_call", "packing.run"):
        monkeypatch.setattr(f"frontend_jax.{place}", launched)
    function, good, changes, error, text = BAD[name]
    with pytest.raises(error, match=re.escape(text)):
        function(**good | changes)
