"""Every check of a call's arguments, and its error message. Runs before any launch, on shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .options import check_chunk_size, check_flag, number, one_of
from .packing import ChunkTable, table_size
from .problem import (
    BACKENDS,
    C_DTYPES,
    GATE_DTYPES,
    INPUT_DTYPES,
    INPUT_GATES,
    LAYOUTS,
    LONGEST_CHUNK,
    MAX_CHUNK,
    MAX_HEAD_DIM,
    MAX_TOKEN_STRIDE,
    NORMALIZER_GRADS,
    OFFSET_DTYPES,
    PRECISIONS,
    Problem,
    Strides,
    contiguous_strides,
)

# What the kernels cannot differentiate, in either framework.
FORWARD_MODE = "mlstm_chunkwise: expected reverse mode, got forward-mode differentiation; use backend='reference'"
TWICE = "mlstm_chunkwise: expected a first derivative, got a call to differentiate twice; use backend='reference'"

BATCHED = (
    "mlstm_chunkwise: expected plain cotangents, got a batch of them (is_grads_batched, vectorize=True); use jacrev "
    "or vjp of torch.func"
)

TOKENS = ("q", "k", "v", "i", "f")
STATES = ("c_initial", "n_initial", "m_initial")


@dataclass(frozen=True)
class ArrayInfo:
    """What the checks need to know of an array."""

    shape: tuple[int, ...]
    dtype: str
    device: str


def _shape(name: str, info: ArrayInfo, symbols: str, expected: tuple[int, ...]) -> None:
    if info.shape != expected:
        raise ValueError(f"{name}: expected shape ({symbols}) = {expected}, got {info.shape}")


def check_dtype(name: str, info: ArrayInfo, allowed: tuple[str, ...]) -> None:
    """Raises TypeError unless the dtype is one of these."""
    if info.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(allowed)}, got {info.dtype}")


def _required(arrays: Mapping[str, ArrayInfo | None], names: Sequence[str]) -> dict[str, ArrayInfo]:
    """The arrays that are there; those of these names must be."""
    for name in names:
        if arrays.get(name) is None:
            raise TypeError(f"{name}: expected an array, got None")
    return {name: info for name, info in arrays.items() if info is not None}


def _cell(eps: Any, input_gate: Any, normalize: Any) -> float:
    """The options of the cell itself; returns eps."""
    check_flag("normalize", normalize)
    one_of("input_gate", input_gate, INPUT_GATES)
    if not normalize and input_gate == "exponential":
        raise ValueError("normalize: expected True with input_gate='exponential', whose states are scaled, got False")
    return number("eps", eps, minimum=0.0)


def _head_dims(K: int, V: int) -> None:
    for name, argument, size in (("K", "q", K), ("V", "v", V)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{argument}: expected 1 <= {name} <= {MAX_HEAD_DIM}, got {name} = {size}")


def _input_dtypes(infos: Mapping[str, ArrayInfo]) -> None:
    check_dtype("q", infos["q"], INPUT_DTYPES)
    for name in ("k", "v"):
        check_dtype(name, infos[name], INPUT_DTYPES)
        if infos[name].dtype != infos["q"].dtype:
            raise TypeError(f"{name}: expected the dtype of q, {infos['q'].dtype}, got {infos[name].dtype}")
    for name in ("i", "f"):
        check_dtype(name, infos[name], GATE_DTYPES)


def _one_device(infos: Mapping[str, ArrayInfo]) -> None:
    for name, info in infos.items():
        if info.device != infos["q"].device:
            raise ValueError(f"{name}: expected the device of q, {infos['q'].device}, got {info.device}")


def _state_m(name: str, info: ArrayInfo, head: tuple[int, int], first: str = "B") -> None:
    if info.shape not in (head, (*head, 1)):
        raise ValueError(f"{name}: expected shape ({first}, H) = {head} or ({first}, H, 1), got {info.shape}")


def _packed(infos: Mapping[str, ArrayInfo], layout: str, B: int, T: int, chunk_size: int | None) -> int:
    """The number of packed sequences; 0 where the batch is none."""
    table = infos.get("chunk_table")
    if "cu_seqlens" not in infos:
        if table is not None:  # of a registered operator alone: a ChunkTable has its offsets
            raise ValueError("chunk_table: expected None without cu_seqlens, got a table")
        return 0
    offsets = infos["cu_seqlens"]
    if len(offsets.shape) != 1 or offsets.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape (N + 1,) of N >= 1 sequences, got {offsets.shape}")
    check_dtype("cu_seqlens", offsets, OFFSET_DTYPES)
    if layout != "bthd":
        raise ValueError(f"layout: expected 'bthd' with cu_seqlens, got {layout!r}")
    if B != 1:
        raise ValueError(f"q: expected B = 1 with cu_seqlens, got B = {B}")
    sequences = offsets.shape[0] - 1
    if table is not None:
        if chunk_size is None:
            raise ValueError("chunk_size: expected that of the chunk_table, got None")
        size = table_size(T, sequences, min(chunk_size, LONGEST_CHUNK))
        _shape("chunk_table", table, "3 * (T // chunk_size + N) + N + 1", (size,))
        check_dtype("chunk_table", table, ("int32",))
    return sequences


def no_packed_segments(cu_seqlens: Any) -> None:
    """Raises ValueError where packed sequences would be split over devices."""
    if cu_seqlens is not None:
        kind = type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: expected None, as packed sequences cannot be split over devices, got {kind}")


def check_segments(problem: Problem, mesh: Mapping[str, int], axes: Mapping[str, str | None]) -> None:
    """Raises ValueError unless the sizes of tokens, batch and heads can be split over these axes of a mesh.

    axes: axis, batch_axis and head_axis, the arguments of these names.
    """
    sizes = {"axis": ("T", problem.T), "batch_axis": ("B", problem.B), "head_axis": ("H", problem.H)}
    given = {name: axis for name, axis in axes.items() if axis is not None}
    for name, axis in given.items():
        one_of(name, axis, tuple(mesh))
        symbol, size = sizes[name]
        if size % mesh[axis]:
            raise ValueError(f"q: expected {symbol} divisible by the {mesh[axis]} devices of {name}, got {size}")
    if len(set(given.values())) < len(given):
        raise ValueError(f"axis, batch_axis, head_axis: expected different axes, got {', '.join(given.values())}")


def check_call(
    arrays: Mapping[str, ArrayInfo | None],
    *,
    eps: float,
    chunk_size: int | None,
    qk_scale: float | None,
    normalizer_grad: str,
    layout: str,
    precision: str,
    backend: str,
    save_states: bool = True,
    input_gate: str = "exponential",
    normalize: bool = True,
    form: str = "chunkwise",
    strides: Mapping[str, Strides] | None = None,
) -> Problem:
    """The problem that valid arguments describe.

    arrays: q, k, v, i, f, the three initial states, cu_seqlens and chunk_table (None where absent). strides: (batch,
    head, token) strides in elements of q, k, v, i, f; contiguous in `layout` if None.
    Raises TypeError (kind of value, dtype) or ValueError (rank, shape, option, device, missing state), with the
    argument's name, what was expected and what came.
    """
    one_of("layout", layout, LAYOUTS)
    one_of("normalizer_grad", normalizer_grad, NORMALIZER_GRADS)
    one_of("precision", precision, PRECISIONS)
    one_of("backend", backend, BACKENDS)
    check_chunk_size(chunk_size)
    check_flag("save_states", save_states)
    eps = _cell(eps, input_gate, normalize)

    infos = _required(arrays, TOKENS)
    symbols = "B, T, H" if layout == "bthd" else "B, H, T"
    q = infos["q"]
    for name, rank in (("q", 4), ("k", 4), ("v", 4), ("i", 3), ("f", 3)):
        if len(infos[name].shape) != rank:
            last = {"q": ", K", "k": ", K", "v": ", V"}.get(name, "")
            raise ValueError(f"{name}: expected rank {rank}, ({symbols}{last}), got shape {infos[name].shape}")
    B, H, T, K = (q.shape[0], q.shape[2], q.shape[1], q.shape[3]) if layout == "bthd" else q.shape
    tokens = q.shape[:3]
    V = infos["v"].shape[3]
    _shape("k", infos["k"], f"{symbols}, K", (*tokens, K))
    _shape("v", infos["v"], f"{symbols}, V", (*tokens, V))
    _shape("i", infos["i"], symbols, tokens)
    _shape("f", infos["f"], symbols, tokens)
    for name, size in (("B", B), ("H", H), ("T", T)):
        if size < 1:
            raise ValueError(f"q: expected {name} >= 1, got {name} = {size} in shape {q.shape}")
    _head_dims(K, V)
    if layout == "bthd" and H * max(K, V) > MAX_TOKEN_STRIDE:
        raise ValueError(f"q, v: expected H * K and H * V <= {MAX_TOKEN_STRIDE} in layout 'bthd', got H = {H}")
    if T >= 2**31 - MAX_CHUNK:
        raise ValueError(f"q: expected T < 2**31 - {MAX_CHUNK}, got T = {T}")

    _input_dtypes(infos)
    given = [name for name in STATES if name in infos]
    if given and len(given) < len(STATES):
        missing = ", ".join(name for name in STATES if name not in infos)
        raise ValueError(f"{missing}: expected all of {', '.join(STATES)} or none, got only {', '.join(given)}")
    sequences = _packed(infos, layout, B, T, chunk_size)
    if given:
        N, symbol = (sequences, "N") if sequences else (B, "B")
        _shape("c_initial", infos["c_initial"], f"{symbol}, H, K, V", (N, H, K, V))
        _shape("n_initial", infos["n_initial"], f"{symbol}, H, K", (N, H, K))
        _state_m("m_initial", infos["m_initial"], (N, H), symbol)
        for name in STATES:
            check_dtype(name, infos[name], C_DTYPES if (name, form) == ("c_initial", "recurrent") else ("float32",))
    _one_device(infos)

    if strides is None:
        dims = {"q": K, "k": K, "v": V, "i": 1, "f": 1}
        strides = {name: contiguous_strides(H, T, D, layout) for name, D in dims.items()}
    return Problem(
        B=B,
        H=H,
        T=T,
        K=K,
        V=V,
        dtype=q.dtype,
        i_dtype=infos["i"].dtype,
        f_dtype=infos["f"].dtype,
        strides=tuple(strides.items()),
        layout=layout,
        scale=K**-0.5 if qk_scale is None else number("qk_scale", qk_scale),
        eps=eps,
        chunk_size=chunk_size and min(chunk_size, LONGEST_CHUNK),
        normalizer_grad=normalizer_grad,
        precision=precision,
        has_initial=bool(given),
        save_states=save_states,
        input_gate=input_gate,
        normalize=normalize,
        form=form,
        c_dtype=infos["c_initial"].dtype if given else "float32",
        sequences=sequences,
        has_table="chunk_table" in infos,
    )


def check_table(cu_seqlens: ArrayInfo | None, T: int, chunk_size: int) -> tuple[int, int]:
    """The length of chunks, and the number of sequences, of a chunk table."""
    check_chunk_size(chunk_size)
    if chunk_size is None or isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"T, chunk_size: expected a length >= 1 and a chunk size, got {T!r} and {chunk_size!r}")
    infos = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    sequences = _packed(infos, "bthd", 1, T, chunk_size)
    if not sequences:
        raise TypeError("cu_seqlens: expected an array, got None")
    return min(chunk_size, LONGEST_CHUNK), sequences


def check_given_table(
    table: Any, q: tuple[int, ...], chunk_size: Any, layout: Any, cu_seqlens: tuple[int, ...] | None
) -> None:
    """Raises unless a call's chunk table was made for its length, its chunks and its number of sequences.

    q, cu_seqlens: their shapes; those of a wrong rank are left to `check_call`, as is the layout.
    """
    if not isinstance(table, ChunkTable):
        raise TypeError(f"chunk_table: expected a ChunkTable (of make_chunk_table), got {type(table).__name__}")
    check_chunk_size(chunk_size)
    if chunk_size is None:
        raise ValueError(f"chunk_size: expected that of the chunk_table, {table.chunk_size}, got None")
    L = min(chunk_size, LONGEST_CHUNK)
    if table.chunk_size != L:
        raise ValueError(f"chunk_table: expected one made for chunk_size = {L}, got one for {table.chunk_size}")
    if len(q) == 4 and layout == "bthd" and table.T != q[1]:
        raise ValueError(f"chunk_table: expected one made for T = {q[1]}, got one for T = {table.T}")
    if cu_seqlens is not None and len(cu_seqlens) == 1 and cu_seqlens[0] != table.sequences + 1:
        N = cu_seqlens[0] - 1
        raise ValueError(f"chunk_table: expected one made for N = {N} sequences, got one for N = {table.sequences}")


def check_step(
    arrays: Mapping[str, ArrayInfo | None],
    *,
    eps: float,
    qk_scale: float | None,
    input_gate: str,
    normalize: bool,
    backend: str,
    strides: Mapping[str, Strides] | None = None,
) -> Problem:
    """The problem of one token.

    arrays: q, k (B, H, K), v (B, H, V), i, f (B, H); c, n, m; perhaps out_states[0], [1], [2]. strides and errors as of
    `check_call`.
    """
    one_of("backend", backend, BACKENDS)
    eps = _cell(eps, input_gate, normalize)
    out = tuple(f"out_states[{x}]" for x in range(3))
    infos = _required(arrays, (*TOKENS, "c", "n", "m", *(out if any(name in arrays for name in out) else ())))
    for name, symbols in (("q", "B, H, K"), ("v", "B, H, V")):
        if len(infos[name].shape) != 3:
            raise ValueError(f"{name}: expected rank 3, ({symbols}), got shape {infos[name].shape}")
    (B, H, K), V = infos["q"].shape, infos["v"].shape[2]
    if min(B, H) < 1:
        raise ValueError(f"q: expected B, H >= 1, got shape {infos['q'].shape}")
    _head_dims(K, V)
    _shape("k", infos["k"], "B, H, K", (B, H, K))
    _shape("v", infos["v"], "B, H, V", (B, H, V))
    _shape("i", infos["i"], "B, H", (B, H))
    _shape("f", infos["f"], "B, H", (B, H))
    _input_dtypes(infos)
    for c, n, m in (("c", "n", "m"), out):
        if c not in infos:
            continue
        _shape(c, infos[c], "B, H, K, V", (B, H, K, V))
        _shape(n, infos[n], "B, H, K", (B, H, K))
        _state_m(m, infos[m], (B, H))
        check_dtype(c, infos[c], C_DTYPES if c == "c" else (infos["c"].dtype,))
        check_dtype(n, infos[n], ("float32",))
        check_dtype(m, infos[m], ("float32",))
    _one_device(infos)
    if strides is None:
        dims = {"q": K, "k": K, "v": V, "i": 1, "f": 1}
        strides = {name: contiguous_strides(H, 1, D, "bhtd") for name, D in dims.items()}
    return Problem(
        B=B,
        H=H,
        T=1,
        K=K,
        V=V,
        dtype=infos["q"].dtype,
        i_dtype=infos["i"].dtype,
        f_dtype=infos["f"].dtype,
        strides=tuple(strides.items()),
        layout="bhtd",
        scale=K**-0.5 if qk_scale is None else number("qk_scale", qk_scale),
        eps=eps,
        chunk_size=None,
        normalizer_grad="exact",
        precision="ieee",
        has_initial=True,
        input_gate=input_gate,
        normalize=normalize,
        form="recurrent",
        c_dtype=infos["c"].dtype,
    )
