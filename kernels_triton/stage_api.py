"""The signatures of the documented stage functions, once for both frontends; each binds them to its executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import stages
from .options import check_flag
from .validation import ArrayInfo

Array = Any
# A stage's plan for given arrays on a GPU architecture, and its execution: what the frontend brings.
Plan = Callable[[Mapping[str, ArrayInfo | None], str], stages.StageCall]
Run = Callable[[Plan, dict[str, Array | None]], tuple[Any, ...]]


class StageFunctions:
    """The stage functions over one framework's arrays. Contiguous arrays are read in place."""

    def __init__(self, run: Run, zeros_like: Callable[[Array], Array]):
        self._execute, self._zeros_like = run, zeros_like

    def _run(self, name: str, arrays: dict[str, Array | None], **options: Any) -> tuple[Any, ...]:
        return self._execute(lambda infos, arch: stages.STAGES[name](infos, {**options, "arch": arch}), arrays)

    def _mlstm_chunkwise__recurrent_fw_C(
        self,
        matK: Array,
        matV: Array,
        vecI: Array,
        vecF: Array,
        matC_initial: Array | None = None,
        vecN_initial: Array | None = None,
        scaM_initial: Array | None = None,
        chunk_size: int = 64,
        num_chunks: int = 1,
    ) -> tuple[Array | None, ...]:
        """The recurrence over chunks: the states that the backward stages take.

        matK, matV: (B, H, T, K), (B, H, T, V). vecI, vecF: (B, H, NT, BT), the input gate pre-activation and the
        log-sigmoid of the forget gate's. Initial states (B, H, K, V), (B, H, K), (B, H), float32; all or none.
        num_chunks = ceil(T / chunk_size).

        Returns matC_states (B, H, NT * K, V) and vecN_states (B, H, NT * K) at each chunk's start, scaM_inter
        (B, H, NT + 1), and the last state's C and N.
        """
        arrays = {"matK": matK, "matV": matV, "vecI": vecI, "vecF": vecF}
        arrays |= {"matC_initial": matC_initial, "vecN_initial": vecN_initial, "scaM_initial": scaM_initial}
        return self._run("_mlstm_chunkwise__recurrent_fw_C", arrays, chunk_size=chunk_size, num_chunks=num_chunks)

    def _mlstm_chunkwise_fw(
        self,
        matQ: Array,
        matK: Array,
        matV: Array,
        vecI: Array,
        vecF: Array,
        matC_initial: Array | None = None,
        vecN_initial: Array | None = None,
        scaM_initial: Array | None = None,
        qk_scale: float | None = None,
        return_last_states: bool = False,
        return_all_states: bool = False,
        chunk_size: int = 64,
        eps: float = 1e-6,
    ) -> tuple[Any, ...]:
        """The forward pass, with what the backward stages take.

        matQ, matK: (B, H, T, K); matV: (B, H, T, V); vecI, vecF: (B, H, T) pre-activations.

        Returns matH (B, H, T, V); vecN_out (B, H, T), the normaliser, eps included; vecM_out (B, H, T); the last
        (C, N, M) or None; the states (matC_states (B, H, NT * K, V), vecN_states (B, H, NT * K), scaM_states
        (B, H, NT + 1)) or None.
        """
        check_flag("return_last_states", return_last_states)
        check_flag("return_all_states", return_all_states)
        arrays = {"matQ": matQ, "matK": matK, "matV": matV, "vecI": vecI, "vecF": vecF}
        arrays |= {"matC_initial": matC_initial, "vecN_initial": vecN_initial, "scaM_initial": scaM_initial}
        results = self._run("_mlstm_chunkwise_fw", arrays, qk_scale=qk_scale, chunk_size=chunk_size, eps=eps)
        last = results[3:6] if return_last_states else None
        return (*results[:3], last, results[6:] if return_all_states else None)

    def _mlstm_chunkwise__recurrent_bw_dC(
        self,
        matQ: Array,
        vecF: Array,
        scaM_inter: Array,
        vecM: Array,
        vecN_out: Array,
        matDeltaH: Array,
        matDeltaC_last: Array | None = None,
        qk_scale: float | None = None,
        chunk_size: int = 64,
        num_chunks: int = 1,
        store_initial_state: bool = False,
    ) -> tuple[Array | None, ...]:
        """The gradients of the states, normaliser detached.

        matQ: (B, H, T, K). vecF: (B, H, NT, BT), log-sigmoid of the forget gate pre-activation, not summed. scaM_inter:
        (B, H, NT + 1). vecM, vecN_out: (B, H, T), stabiliser and normaliser. matDeltaH: (B, H, T, V). matDeltaC_last:
        (B, H, K, V) float32 or None. num_chunks = ceil(T / chunk_size).

        Returns (B, H, NT * K, V), block k the gradient of the state after chunk k; and the initial state's gradient
        (B, H, K, V), None unless store_initial_state.
        """
        arrays = {"matQ": matQ, "vecF": vecF, "scaM_inter": scaM_inter, "vecM": vecM, "vecN_out": vecN_out}
        arrays |= {"matDeltaH": matDeltaH, "matDeltaC_last": matDeltaC_last}
        options = {"qk_scale": qk_scale, "chunk_size": chunk_size, "num_chunks": num_chunks}
        options["store_initial_state"] = store_initial_state
        return self._run("_mlstm_chunkwise__recurrent_bw_dC", arrays, **options)

    def _mlstm_chunkwise__parallel_bw_dQKV(
        self,
        matQ: Array,
        matK: Array,
        matV: Array,
        vecI: Array,
        vecF: Array,
        vecM_combine: Array,
        scaM_inter: Array,
        matC_states: Array,
        matDeltaH: Array,
        vecN_out: Array,
        matDeltaC_states: Array,
        qk_scale: float | None = None,
        chunk_size: int = 64,
        num_chunks: int = 1,
    ) -> tuple[Array | None, ...]:
        """The gradients of q, k, v, normaliser detached.

        matQ, matK: (B, H, T, K); matV, matDeltaH: (B, H, T, V). vecI, vecF: (B, H, NT, BT), the input gate
        pre-activation and the log-sigmoid of the forget gate's. vecM_combine, vecN_out: (B, H, T). scaM_inter:
        (B, H, NT + 1). matC_states, matDeltaC_states: (B, H, NT * K, V), states at each chunk's start and gradients
        after each chunk.

        Returns dQ, dK, dV like matQ, matK, matV.
        """
        arrays = {"matQ": matQ, "matK": matK, "matV": matV, "vecI": vecI, "vecF": vecF, "vecM_combine": vecM_combine}
        arrays |= {"scaM_inter": scaM_inter, "matC_states": matC_states, "matDeltaH": matDeltaH, "vecN_out": vecN_out}
        arrays |= {"matDeltaC_states": matDeltaC_states}
        options = {"qk_scale": qk_scale, "chunk_size": chunk_size, "num_chunks": num_chunks}
        return self._run("_mlstm_chunkwise__parallel_bw_dQKV", arrays, **options)

    def _mlstm_chunkwise_bw(
        self,
        matQ: Array,
        matK: Array,
        matV: Array,
        vecI: Array,
        vecF: Array,
        matC_initial: Array | None = None,
        vecN_initial: Array | None = None,
        scaM_initial: Array | None = None,
        qk_scale: float | None = None,
        matC_states: Array | None = None,
        scaM_states: Array | None = None,
        vecN_out: Array | None = None,
        vecM_out: Array | None = None,
        matDeltaH: Array | None = None,
        matDeltaC_last: Array | None = None,
        chunk_size: int = 64,
    ) -> tuple[Array | None, ...]:
        """The whole backward pass, normaliser detached.

        matQ, matK: (B, H, T, K); matV, matDeltaH: (B, H, T, V); vecI, vecF: (B, H, T) pre-activations. matC_states
        (B, H, NT * K, V), scaM_states (B, H, NT + 1), vecN_out, vecM_out (B, H, T) as `_mlstm_chunkwise_fw` returns
        them; what is None is computed again.

        Returns dQ, dK, dV, dI, dF, and dC, dN, dM of the initial state (None without one). As documented for the system
        that this mirrors, dN and dM are zeros and all gradients are those of a constant normaliser; `mlstm_chunkwise`
        has the exact ones.
        """
        arrays = {"matQ": matQ, "matK": matK, "matV": matV, "vecI": vecI, "vecF": vecF}
        arrays |= {"matC_initial": matC_initial, "vecN_initial": vecN_initial, "scaM_initial": scaM_initial}
        arrays |= {"matC_states": matC_states, "scaM_states": scaM_states, "vecN_out": vecN_out, "vecM_out": vecM_out}
        arrays |= {"matDeltaH": matDeltaH, "matDeltaC_last": matDeltaC_last}
        gradients = self._run("_mlstm_chunkwise_bw", arrays, qk_scale=qk_scale, chunk_size=chunk_size)
        zeros = (None if x is None else self._zeros_like(x) for x in (vecN_initial, scaM_initial))
        return (*gradients, *zeros)
