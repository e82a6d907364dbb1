"""What the compile check compiles: targets, head dims, dtypes, and the passes of each variant of the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .cases import DEFAULTS

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADS = ("64x64", "128x128", "128x256", "256x512")
# Odd V above 96, which ptxas 12.8 made wrong Hopper code for (kernels_triton/assembler.py): in these variants alone,
# to save time. The second has chunk_forward for each of them, the kernel that was wrong.
# (359, 15) in chunks of 256: what ptxas 12.9 and 13.0 have made wrong code of, where registers were spilled.
ODD = ("48x97", "64x97", "65x257", "256x105", "359x15")
OF_ODD = ("exact", "80 heads", "chunks of 256")
DTYPES = ("bfloat16", "float32")
B, H, T = 2, 4, 520  # only strides come from these; T is ragged
LONG, SEQUENCES = 2100, 3  # long enough for scans in segments; packed sequences
# By name, the operator's options that other kernels come from.
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "detached": {"normalizer_grad": "detached"},
    "recurrent": {"form": "recurrent"},
    "plain": {"input_gate": "sigmoid", "normalize": False},
    "packed": {"packed": True, "layout": "bthd"},
    "segment": {},  # of a sequence that is split over devices
    "many heads": {"B": 32},  # the fused kernels, where the table has any
    "some heads": {"B": 24},  # too many for segments, too few for the fused forward kernel
    "80 heads": {"B": 20},
    "long": {"T": LONG},  # in segments
    "chunks of 256": {"chunk_size": 256},
    "chunks of 512": {"stage_chunk": 512},  # the stage functions' longest: the operator's are half as long at most
}
FORWARD_ALONE = ("recurrent", "80 heads", "chunks of 512")  # the backward pass of the latter compiles for half a minute
# Those that are compiled for some targets, head dims and dtypes only, since they differ from the rest in little.
HOPPER = ("sm_90", "128x256", "bfloat16")
SOME = (HOPPER, *((target, "64x64", "bfloat16") for target in TARGETS))
RARE = {
    "plain": (HOPPER,),
    "packed": SOME,
    "segment": (*SOME, ("sm_90", "64x64", "float32")),
    "many heads": SOME,
    "some heads": (HOPPER, ("sm_90", "128x128", "bfloat16")),
    "80 heads": tuple(("sm_90", heads, "bfloat16") for heads in ODD),
    "long": (HOPPER, ("sm_90", "64x64", "bfloat16"), ("sm_90", "128x256", "float32")),
    "chunks of 256": (("sm_90", "359x15", "bfloat16"),),
    "chunks of 512": (("sm_90", "256x512", "bfloat16"),),  # the largest rows of scores, beside the widest keys
}


def make_problem(heads: str, dtype: str, changes: dict[str, Any]) -> Any:
    """The problem of a call.

    changes: options of the operator; B, T or packed in place of the usual sizes; stage_chunk, of a stage function.
    """
    from kernels_triton.validation import ArrayInfo, check_call

    K, V = map(int, heads.split("x"))
    options = {**DEFAULTS, "backend": "auto"} | changes
    del options["return_last_states"]  # no matter of the kernels
    packed, stage_chunk = options.pop("packed", False), options.pop("stage_chunk", None)
    batch, length = options.pop("B", B), options.pop("T", T)
    tokens = (1, LONG, H) if packed else (batch, H, length)
    states = (SEQUENCES if packed else batch, H)
    shapes: dict[str, tuple[int, ...]] = {"q": (*tokens, K), "k": (*tokens, K), "v": (*tokens, V)}
    arrays = {name: ArrayInfo(shape, dtype, "") for name, shape in shapes.items()}
    shapes = {"i": tokens, "f": tokens, "c_initial": (*states, K, V), "n_initial": (*states, K), "m_initial": states}
    arrays |= {name: ArrayInfo(shape, "float32", "") for name, shape in shapes.items()}
    if packed:
        arrays["cu_seqlens"] = ArrayInfo((SEQUENCES + 1,), "int32", "")
    problem = check_call(arrays, **options)
    return dataclasses.replace(problem, chunk_size=stage_chunk or problem.chunk_size)


def passes(
    heads: str, dtype: str, arch: str, descriptors: bool = False, chunk_size: int | None = None
) -> Iterator[tuple[str, Any, dict[str, tuple[tuple[int, ...], str]]]]:
    """(variant, pass, its inputs' shapes and dtypes); a variant's two passes, the forward ones first."""
    from kernels_triton import plan

    for variant, changes in VARIANTS.items():
        if variant in RARE and (arch, heads, dtype) not in RARE[variant]:
            continue
        if heads in ODD and variant not in OF_ODD:
            continue
        problem = make_problem(heads, dtype, {"chunk_size": chunk_size} | changes)
        aligned = problem.K % 8 == 0 and problem.V % 8 == 0  # as descriptors ask for: 16 bytes
        problem = dataclasses.replace(problem, arch=arch, descriptors=descriptors and aligned)
        forward = plan.forward_pass(problem)
        tokens = (1, problem.T, H) if problem.sequences else (problem.B, H, problem.T)
        K, V = problem.K, problem.V
        known: dict[str, tuple[tuple[int, ...], str]] = {
            name: ((*tokens, D), dtype) for name, D in (("q", K), ("k", K), ("v", V), ("dh", V))
        }
        known |= {name: (tokens, "float32") for name in ("i", "f")}
        known["cu_seqlens"] = ((SEQUENCES + 1,), "int32")
        for suffix in ("initial", "last"):
            for name, shape in (("c", (K, V)), ("n", (K,)), ("m", ())):
                known[f"{name}_{suffix}"] = known[f"d{name}_{suffix}"] = ((*problem.state_heads, *shape), "float32")
        for launch in forward.launches:
            known |= {buffer: (spec.shape, spec.dtype) for buffer, spec in launch.outputs.values()}
        if variant == "segment":
            segment = plan.segment_state(problem), plan.segment_cotangent(problem, None, True)
            known |= {name: (spec.shape, spec.dtype) for name, spec in segment[1].specs.items()}
            for program in (*segment, plan.segment_backward(problem, None, True)):
                yield variant, program, {name: known[name] for name in program.inputs}
            continue
        if variant != "detached":  # the forward pass does not depend on it
            yield "forward" if variant == "exact" else variant, forward, {name: known[name] for name in forward.inputs}
        if variant not in FORWARD_ALONE:
            backward = plan.backward_pass(problem, None, True)
            yield variant, backward, {name: known[name] for name in backward.inputs}
