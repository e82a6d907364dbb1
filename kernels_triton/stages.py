"""The documented stage functions as views of the operator's own plan: their names, shapes and launches.

Conventions where that document leaves a choice: `vecF` in chunks is logsigmoid of the forget pre-activation, not
summed, natural log; `vecN_out` is the normaliser d per token, eps included; `scaM_inter` holds NT + 1 stabilisers, the
last state's included; block k of the dC states is the gradient of the state after chunk k, NT blocks.
Gradients are the "detached" ones: the normaliser is a constant. For exact gradients use `mlstm_chunkwise`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .builder import Builder
from .launch import Launch, Pass
from .options import check_chunk_size, check_flag
from .problem import DEFAULT_ARCH, GATE_DTYPES, INPUT_DTYPES, MAX_HEAD_DIM, Problem, contiguous_strides
from .validation import STATES, ArrayInfo, check_call, check_dtype

Infos = Mapping[str, ArrayInfo | None]


@dataclasses.dataclass(frozen=True)
class StageCall:
    """A pass, the argument behind each of its input buffers, and what to return: (buffer or None, shape), ..."""

    program: Pass
    arguments: dict[str, str]
    returns: tuple[tuple[str | None, tuple[int, ...]], ...]


INPUTS = ("matQ", "matK", "matV", "matDeltaH")  # of one dtype
GATES = ("vecI", "vecF")
STATES_MADE = ("matC_states", "matDeltaC_states")  # in the dtype that the stages make them in; all else is float32
SHAPES = {
    "matQ": "B, H, T, K",
    "matK": "B, H, T, K",
    "matV": "B, H, T, V",
    "matDeltaH": "B, H, T, V",
    "vecI": "B, H, T",
    "vecF": "B, H, T",
    "matC_initial": "B, H, K, V",
    "vecN_initial": "B, H, K",
    "scaM_initial": "B, H",
    "scaM_inter": "B, H, NT + 1",
    "scaM_states": "B, H, NT + 1",
    "vecM": "B, H, T",
    "vecM_combine": "B, H, T",
    "vecM_out": "B, H, T",
    "vecN_out": "B, H, T",
    "matDeltaC_last": "B, H, K, V",
    "matC_states": "B, H, NT * K, V",
    "matDeltaC_states": "B, H, NT * K, V",
}
CHUNKED = "B, H, NT, BT"  # gates of the stages that take them in chunks


def _present(infos: Infos, *names: str) -> None:
    for name in names:
        if infos.get(name) is None:
            raise TypeError(f"{name}: expected an array, got None")


def _rows(infos: Infos, names: tuple[str, str], last: str) -> ArrayInfo:
    """The first of two arrays that is there, of which the sizes are taken: (B, H, T, last)."""
    name, info = next((name, x) for name in names if (x := infos.get(name)) is not None)
    if len(info.shape) != 4:
        raise ValueError(f"{name}: expected rank 4, (B, H, T, {last}), got shape {info.shape}")
    return info


def _chunks(T: int, options: Mapping[str, Any], chunked: bool) -> int:
    """The number of chunks; raises unless the options say the same."""
    chunk_size = options["chunk_size"]
    check_chunk_size(chunk_size)
    if chunk_size is None:
        raise TypeError("chunk_size: expected an int, got None")
    NT = -(-T // chunk_size)
    given = options.get("num_chunks")
    if chunked and (isinstance(given, bool) or not isinstance(given, int)):
        raise TypeError(f"num_chunks: expected an int, got {type(given).__name__}")
    if chunked and given != NT:
        raise ValueError(f"num_chunks: expected ceil(T / chunk_size) = {NT}, got {given}")
    return NT


def _check_arrays(infos: Infos, keys: ArrayInfo, sizes: Mapping[str, int], chunked: bool) -> None:
    """Shapes, dtypes and devices of all arguments."""
    values = {**sizes, "NT + 1": sizes["NT"] + 1, "NT * K": sizes["NT"] * sizes["K"]}
    check_dtype("matQ" if infos.get("matQ") else "matK", keys, INPUT_DTYPES)
    state_dtype = "bfloat16" if keys.dtype == "bfloat16" else "float32"
    for name, info in infos.items():
        if info is None:
            continue
        symbols = CHUNKED if chunked and name in GATES else SHAPES[name]
        expected = tuple(values[x] for x in symbols.split(", "))
        # As of the operator, m may have an axis of one more.
        if info.shape != expected and not (name == "scaM_initial" and info.shape == (*expected, 1)):
            raise ValueError(f"{name}: expected shape ({symbols}) = {expected}, got {info.shape}")
        allowed = (keys.dtype,) if name in INPUTS else GATE_DTYPES if name in GATES else ("float32",)
        check_dtype(name, info, (state_dtype,) if name in STATES_MADE else allowed)
        if info.device != keys.device:
            raise ValueError(f"{name}: expected the device of the others, {keys.device}, got {info.device}")


def _problem(infos: Infos, options: Mapping[str, Any], chunked: bool) -> Problem:
    """The detached problem behind a stage's arguments, all checked. chunked: gates in chunks."""
    keys, values = _rows(infos, ("matQ", "matK"), "K"), _rows(infos, ("matV", "matDeltaH"), "V")
    B, H, T, K = keys.shape
    V = values.shape[3]
    for symbol, size, most in (("B", B, None), ("H", H, None), ("T", T, None), ("K", K, MAX_HEAD_DIM)):
        _size("matQ" if infos.get("matQ") else "matK", symbol, size, most)
    _size("matV" if infos.get("matV") else "matDeltaH", "V", V, MAX_HEAD_DIM)
    if "store_initial_state" in options:
        check_flag("store_initial_state", options["store_initial_state"])
    NT, chunk_size = _chunks(T, options, chunked), options["chunk_size"]
    sizes = {"B": B, "H": H, "T": T, "K": K, "V": V, "NT": NT, "BT": chunk_size}
    _check_arrays(infos, keys, sizes, chunked)
    gates = [dataclasses.replace(x, shape=(B, H, T)) for name in GATES if (x := infos.get(name)) is not None]
    arrays: dict[str, ArrayInfo | None] = {"q": keys, "k": keys, "v": values, "i": gates[0], "f": gates[-1]}
    seed_names = ("matC_initial", "vecN_initial", "scaM_initial")
    given = [name for name in seed_names if infos.get(name) is not None]
    if given and len(given) < len(seed_names):
        missing = ", ".join(name for name in seed_names if name not in given)
        raise ValueError(f"{missing}: expected all of {', '.join(seed_names)} or none, got only {', '.join(given)}")
    arrays |= {name: infos.get(seed) for name, seed in zip(STATES, seed_names, strict=True)}
    rows = NT * chunk_size if chunked else T
    strides = {name: contiguous_strides(H, T, D, "bhtd") for name, D in (("q", K), ("k", K), ("v", V))}
    strides |= {name: (H * rows, rows, 1) for name in ("i", "f")}
    problem = check_call(
        arrays,
        eps=options.get("eps", 1e-6),
        chunk_size=chunk_size,
        qk_scale=options.get("qk_scale"),
        normalizer_grad="detached",
        layout="bhtd",
        precision="ieee",
        backend="auto",
        strides=strides,
    )
    return dataclasses.replace(problem, chunk_size=chunk_size, arch=options.get("arch", DEFAULT_ARCH))


def _size(name: str, symbol: str, size: int, most: int | None) -> None:
    if size < 1 or (most is not None and size > most):
        limit = f"{symbol} >= 1" if most is None else f"1 <= {symbol} <= {most}"
        raise ValueError(f"{name}: expected {limit}, got {symbol} = {size}")


def _call(
    problem: Problem,
    launches: Sequence[Launch],
    arguments: dict[str, str],
    returns: Sequence[str | None],
) -> StageCall:
    """Fills in shapes: states and their gradients have their chunks and keys on one axis, as the seed's do."""
    read = {buffer for launch in launches for buffer in launch.buffers}
    made = {buffer for launch in launches for buffer, _ in launch.outputs.values()}
    inputs = tuple(buffer for buffer in arguments if buffer in read and buffer not in made)
    missing = read - made - set(inputs)
    if missing:
        raise RuntimeError(f"stage: buffers {sorted(missing)} have no source")
    program = Pass(tuple(launches), inputs, tuple(name for name in returns if name))
    p, NT = problem, -(-problem.T // (problem.chunk_size or 1))
    shapes = {
        **dict.fromkeys(("states", "dstates"), (p.B, p.H, NT * p.K, p.V)),
        **dict.fromkeys(("norms", "dnorms"), (p.B, p.H, NT * p.K)),
    }
    shaped = tuple((name, shapes.get(name) or program.spec(name).shape if name else ()) for name in returns)
    return StageCall(program, {buffer: arguments[buffer] for buffer in inputs}, shaped)


_ARRAYS = {"q": "matQ", "k": "matK", "v": "matV", "i": "vecI", "f": "vecF", "dh": "matDeltaH"}
_INITIAL = {"c_initial": "matC_initial", "n_initial": "vecN_initial", "m_initial": "scaM_initial"}


def _builder(problem: Problem) -> Builder:
    b = Builder(problem)
    b.strides["dh"] = b.strides["v"]
    return b


def recurrent_fw_C(infos: Infos, options: Mapping[str, Any]) -> StageCall:
    """Chunk-start states (C, n), boundary stabilisers, and the last state."""
    _present(infos, "matK", "matV", "vecI", "vecF")
    problem = _problem(infos, options, chunked=True)
    b = _builder(problem)
    launches = (b.gates(f_is_log=True), *b.state_forward())
    return _call(problem, launches, _ARRAYS | _INITIAL, ("states", "norms", "m_chunk", "c_last", "n_last"))


def fw(infos: Infos, options: Mapping[str, Any]) -> StageCall:
    """h, d and m per token, the last state, and the states that the backward stages take."""
    _present(infos, "matQ", "matK", "matV", "vecI", "vecF")
    problem = _problem(infos, options, chunked=False)
    b = _builder(problem)
    launches = (b.gates(), *b.state_forward(), b.outputs(store_d=True))
    returns = ("h", "d", "m", "c_last", "n_last", "m_last", "states", "norms", "m_chunk")
    return _call(problem, launches, _ARRAYS | _INITIAL, returns)


def recurrent_bw_dC(infos: Infos, options: Mapping[str, Any]) -> StageCall:
    """Gradients of the states after each chunk; of the initial state if asked for."""
    _present(infos, "matQ", "vecF", "scaM_inter", "vecM", "vecN_out", "matDeltaH")
    problem = _problem(infos, options, chunked=True)
    b = _builder(problem)
    launches = (
        b.gates(i=None, f_is_log=True, m_token="m_given", m_chunk="m_chunk_given"),
        b.normaliser(given="d_given"),
        *b.state_backward(infos.get("matDeltaC_last") is not None, False, outer=False, norms=False),
    )
    given = {"m_given": "vecM", "m_chunk_given": "scaM_inter", "d_given": "vecN_out", "dc_last": "matDeltaC_last"}
    first = "dc_initial" if options["store_initial_state"] else None
    return _call(problem, launches, _ARRAYS | given, ("dstates", first))


def parallel_bw_dQKV(infos: Infos, options: Mapping[str, Any]) -> StageCall:
    """dQ, dK, dV from the states and their gradients."""
    _present(infos, "matQ", "matK", "matV", "vecI", "vecF", "vecM_combine", "scaM_inter")
    _present(infos, "matC_states", "matDeltaH", "vecN_out", "matDeltaC_states")
    problem = _problem(infos, options, chunked=True)
    b = _builder(problem)
    launches = (
        b.gates(f_is_log=True, m_token="m_given", m_chunk="m_chunk_given"),
        b.normaliser(given="d_given"),
        b.gradients(norms=False),
    )
    given = {"m_given": "vecM_combine", "m_chunk_given": "scaM_inter", "d_given": "vecN_out"}
    given |= {"states": "matC_states", "dstates": "matDeltaC_states"}
    return _call(problem, launches, _ARRAYS | given, ("dq", "dk", "dv"))


def bw(infos: Infos, options: Mapping[str, Any]) -> StageCall:
    """All gradients. What the forward pass left is used where given, and computed again where not.

    The last state, which matDeltaC_last acts on, is no argument of the documented function: then states are computed.
    """
    _present(infos, "matQ", "matK", "matV", "vecI", "vecF", "matDeltaH")
    problem = _problem(infos, options, chunked=False)
    b = _builder(problem)
    has_dc_last = infos.get("matDeltaC_last") is not None
    m_given = infos.get("scaM_states") is not None and infos.get("vecM_out") is not None
    launches = [b.gates(m_token="m_given", m_chunk="m_chunk_given") if m_given else b.gates()]
    # Given states are scaled by given stabilisers: without those they have no meaning here.
    states_given = infos.get("matC_states") is not None and m_given and not has_dc_last
    d_given = infos.get("vecN_out") is not None
    if not states_given or not d_given:
        launches += b.state_forward()
    if not d_given:
        launches.append(b.outputs(store_d=True))
    launches += [
        b.normaliser(given="d_given" if d_given else "d"),
        *b.state_backward(has_dc_last, False, norms=False),
        b.gradients(norms=False),
        *b.gates_gradient(has_dlast=has_dc_last, has_dm_last=False),
    ]
    given = {"m_given": "vecM_out", "m_chunk_given": "scaM_states", "d_given": "vecN_out", "states": "matC_states"}
    given |= {"dc_last": "matDeltaC_last"}
    first = "dc_initial" if problem.has_initial else None
    returns = ("dq", "dk", "dv", "di", "df", first)
    return _call(problem, launches, _ARRAYS | _INITIAL | given, returns)


STAGES: dict[str, Callable[[Infos, Mapping[str, Any]], StageCall]] = {
    "_mlstm_chunkwise__recurrent_fw_C": recurrent_fw_C,
    "_mlstm_chunkwise_fw": fw,
    "_mlstm_chunkwise__recurrent_bw_dC": recurrent_bw_dC,
    "_mlstm_chunkwise__parallel_bw_dQKV": parallel_bw_dQKV,
    "_mlstm_chunkwise_bw": bw,
}
