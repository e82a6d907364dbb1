"""The operator for PyTorch: argument checks, autograd, and the choice of backend. No numerics of its own."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Float, Float32, Int
from torch import Tensor

from kernels_triton.options import check_flag
from kernels_triton.packing import ChunkTable

from . import library
from .adapter import run_kernels
from .calls import Tensors, settle
from .packing import packed_arguments
from .reference import run_reference

States = tuple[Float32[Tensor, "B H K V"], Float32[Tensor, "B H K"], Float32[Tensor, "B H"]]


def apply(tensors: Tensors, last: bool, options: dict[str, Any], form: str = "chunkwise") -> tuple[Tensor, Any]:
    """h, and the three last states if asked for by `last`.

    tensors: by NAMES, perhaps by ARGUMENTS; options: of `check_call`.
    """
    check_flag("return_last_states", last)
    tensors = (*library.autocast(tensors[:3]), *tensors[3:])
    if not library.is_plain(tensors):
        return library.apply(tensors, options, form)
    call, tensors = settle(tensors, options, form)
    return run_reference(call.problem, tensors) if call.backend == "reference" else run_kernels(call, tensors, last)


def mlstm_chunkwise(
    q: Float[Tensor, "B _ _ K"],
    k: Float[Tensor, "B _ _ K"],
    v: Float[Tensor, "B _ _ V"],
    i: Float[Tensor, "B _ _"],
    f: Float[Tensor, "B _ _"],
    c_initial: Float32[Tensor, "B H K V"] | None = None,
    n_initial: Float32[Tensor, "B H K"] | None = None,
    m_initial: Float32[Tensor, "B H"] | Float32[Tensor, "B H 1"] | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    *,
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    save_states: bool = True,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    cu_seqlens: Int[Tensor, " offsets"] | None = None,
    chunk_table: ChunkTable | None = None,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Tensor, "B _ _ V"] | tuple[Float[Tensor, "B _ _ V"], States]:
    """The mLSTM over a whole sequence, chunk by chunk, differentiable in all eight arrays.

    h_t = C_t^T (s q_t) / (max(|n_t . s q_t|, exp(-m_t)) + eps), with C_t = f' C_{t-1} + i' k_t v_t^T, n_t alike, and
    exponential input gate and sigmoid forget gate stabilised by m_t (Beck et al. 2024, arXiv:2405.04517; chunkwise
    form: Beck et al. 2025, arXiv:2503.14376). Equations and gradients: docs/architecture.md.

    Args:
        q, k: queries and keys, (B, H, T, K) or with layout="bthd" (B, T, H, K); float32, bfloat16 or float16.
        v: values, (B, H, T, V) or (B, T, H, V), in the dtype of q. 1 <= K, V <= 512, T >= 1.
            A NaN in v reaches earlier tokens too: those of its own chunk and head.
        i, f: input and forget gate pre-activations (natural-log units), (B, H, T) or (B, T, H); any float dtype,
            computed in float32 or better.
        c_initial, n_initial, m_initial: state before the first token, (B, H, K, V), (B, H, K), (B, H) or (B, H, 1),
            float32; all three or none (then zeros).
        return_last_states: also return the state after the last token.
        eps: added to the normaliser.
        chunk_size: tokens per chunk, a power of two from 16 to 512; None: the best for the shape. The result is the
            same to rounding. So is, in float32, h of the first tokens alone: to rounding, not to the bit.
        qk_scale: s above; None: K ** -0.5.
        normalizer_grad: "exact", or "detached": the normaliser is a constant in the backward pass, as in mlstm-kernels
            (right only if a scale-invariant norm follows h).
            "exact" is the derivative of h with m held constant where eps is added: the gates' gradients are off by
            about eps / d (1e-6 at the default eps, 30 % at eps = 0.5). An exact tie in a maximum sends the whole
            cotangent one way, where autodiff halves it.
        layout: axis order of q, k, v, i, f and h. Both are read in place.
        precision: of products of float32 inputs: "ieee", "tf32x3" or "tf32".
        save_states: keep the chunks' states for the backward pass; False: compute them again there, which takes less
            memory and more time. Same gradients.
        input_gate: "exponential", or "sigmoid": i' = sigmoid(i), and m is 0 throughout (but for m_initial, which scales
            the initial state as ever).
        normalize: False, with the sigmoid gate only: h_t = C_t^T (s q_t). Then n is neither read nor computed: n_last
            is 0.
        cu_seqlens: packed sequences, for B = 1 and layout "bthd": N + 1 offsets, int32 or int64; sequence s has tokens
            cu_seqlens[s] to cu_seqlens[s + 1] - 1, perhaps none. States are (N, H, ...) then, one per sequence. Checked
            where they are on the host; elsewhere offsets that do not go from 0 to T, or go down, give wrong
            results.
        chunk_table: `make_chunk_table(cu_seqlens, T, chunk_size)`, to share between calls; without it each makes its
            own. cu_seqlens may then be None. One made for another T, chunk_size or number of sequences is refused, as
            are cu_seqlens on the host that are not the table's; where they differ on a GPU, h and the gradients of
            q, k, v, i and f are NaN.
        backend: "triton" (CUDA or ROCm device), "interpret" (the same kernels on a CPU under TRITON_INTERPRET=1, slow),
            "reference" (native operations, any device), "auto" (triton on a GPU, else reference).

    Returns:
        h like v; with return_last_states (h, (c_last, n_last, m_last)), states float32 as the initial ones, m (B, H).

    Raises:
        TypeError, ValueError: the argument, what was expected and what came; before anything is launched.
    """
    options = {
        "eps": eps,
        "chunk_size": chunk_size,
        "qk_scale": qk_scale,
        "normalizer_grad": normalizer_grad,
        "layout": layout,
        "precision": precision,
        "save_states": save_states,
        "input_gate": input_gate,
        "normalize": normalize,
        "backend": backend,
    }
    offsets, table, i = packed_arguments(cu_seqlens, chunk_table, q, i, chunk_size, layout)
    tensors = (q, k, v, i, f, c_initial, n_initial, m_initial, offsets, table)
    h, last = apply(tensors, return_last_states, options)
    return (h, last) if return_last_states else h
