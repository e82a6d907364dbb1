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
from .options import check_chunk_size
from .problem import DEFAULT_ARCH, Problem, contiguous_strides
from .validation import STATES, ArrayInfo, check_call

Infos = Mapping[str, ArrayInfo | None]


@dataclasses.dataclass(frozen=True)
class StageCall:
    """A pass, the argument behind each of its input buffers, and what to return: (buffer or None, shape), ..."""

    program: Pass
    arguments: dict[str, str]
    returns: tuple[tuple[str | None, tuple[int, ...]], ...]


def _present(infos: Infos, *names: str) -> None:
    for name in names:
        if infos.get(name) is None:
            raise ValueError(f"{name}: expected an array, got None")


def _problem(infos: Infos, options: Mapping[str, Any], chunked: bool) -> Problem:
    """The detached problem behind a stage's arguments; what it lacks stands in by shape. chunked: gates in chunks."""
    chunk_size, num_chunks = options["chunk_size"], options.get("num_chunks")
    check_chunk_size(chunk_size)
    if chunk_size is None:
        raise TypeError("chunk_size: expected an int, got None")
    keys = infos.get("matQ") or infos["matK"]
    values = infos.get("matDeltaH") or infos["matV"]
    assert keys is not None and values is not None
    if len(keys.shape) != 4:
        raise ValueError(f"matQ, matK: expected rank 4, (B, H, T, K), got shape {keys.shape}")
    B, H, T = keys.shape[:3]
    NT = -(-T // chunk_size)
    gates = ("vecI", "vecF")
    if chunked:
        if num_chunks != NT:
            raise ValueError(f"num_chunks: expected ceil(T / chunk_size) = {NT}, got {num_chunks}")
        for name in gates:
            info = infos.get(name)
            if info is not None and info.shape != (B, H, NT, chunk_size):
                raise ValueError(f"{name}: expected shape (B, H, NT, BT) = {(B, H, NT, chunk_size)}, got {info.shape}")
    f = infos["vecF"]
    assert f is not None
    stand_in = dataclasses.replace(f, shape=(B, H, T)) if chunked else f
    i = infos.get("vecI")
    arrays: dict[str, ArrayInfo | None] = {
        "q": infos.get("matQ") or keys,
        "k": infos.get("matK") or keys,
        "v": infos.get("matV") or values,
        "i": stand_in if chunked or i is None else i,
        "f": stand_in,
    }
    seed_names = ("matC_initial", "vecN_initial", "scaM_initial")
    arrays |= {name: infos.get(seed) for name, seed in zip(STATES, seed_names, strict=True)}
    V = values.shape[-1]
    rows = NT * chunk_size if chunked else T
    dims = {"q": keys.shape[3], "k": keys.shape[3], "v": V}
    strides = {name: contiguous_strides(H, T, D, "bhtd") for name, D in dims.items()}
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
    problem = dataclasses.replace(problem, chunk_size=chunk_size, arch=options.get("arch", DEFAULT_ARCH))
    K = problem.K
    expected = {
        "scaM_inter": (B, H, NT + 1),
        "scaM_states": (B, H, NT + 1),
        "vecM": (B, H, T),
        "vecM_combine": (B, H, T),
        "vecM_out": (B, H, T),
        "vecN_out": (B, H, T),
        "matDeltaH": (B, H, T, V),
        "matDeltaC_last": (B, H, K, V),
        "matC_states": (B, H, NT * K, V),
        "matDeltaC_states": (B, H, NT * K, V),
    }
    for name, shape in expected.items():
        info = infos.get(name)
        if info is not None and info.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {info.shape}")
    return problem


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
