"""Runs a pass on JAX arrays: through jax-triton on a GPU, or by a callback into the shared interpreter executor."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_triton import assembler, interpreter
from kernels_triton.launch import Descriptor, Pass, Spec

Arrays = dict[str, jax.Array]


def _struct(spec: Spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype))


@functools.cache
def _triton_call() -> tuple[Callable[..., Any], str, dict[str, Any]]:
    """jax-triton's call, its name for the outputs and its way to state fp fusion: both differ between 0.3 and 0.4."""
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
    finally:  # importing jax-triton clears the variable, and the next launch by torch in this process would fail
        os.environ.pop("TRITON_CACHE_DIR", None)
        if cache_dir is not None:
            os.environ["TRITON_CACHE_DIR"] = cache_dir
    names = inspect.signature(jax_triton.triton_call).parameters
    fusion = {"enable_fp_fusion": True}
    options = fusion if "enable_fp_fusion" in names else {"backend_options": fusion}
    return jax_triton.triton_call, "out_type" if "out_type" in names else "out_shape", options


def _capabilities() -> set[int]:
    """The compute capabilities of the NVIDIA GPUs here, such as 90."""
    try:
        gpus: list[Any] = jax.local_devices(backend="cuda")
    except RuntimeError:  # there are none
        return set()
    return {int(x.compute_capability.replace(".", "")) for x in gpus}


def plugin_folder() -> Path | None:
    """The folder of the library that assembles and launches Triton kernels for JAX; None without a CUDA plugin."""
    from jaxlib import gpu_triton

    library: Any = getattr(gpu_triton, "_cuda_triton", None)
    return Path(library.__file__).parent if library else None


def assembler_options(capability: int) -> dict[str, Any]:
    """Options of Triton for what jaxlib assembles for a compute capability: PTX that its assembler knows.

    jaxlib takes PTX from jax-triton and looks for a ptxas itself. Raises RuntimeError if that one is faulty. If there
    is none, jaxlib has its own words for it.
    """
    folder = plugin_folder()
    found = assembler.found_by_xla(folder) if folder else None
    if found is None:
        return {}
    assembler.check(found, capability, assembler.XLA_REMEDY)
    known = assembler.ptx_version(found, capability)
    return {} if known == assembler.tritons_ptx_version(capability) else {"ptx_version": known}


def launch_all(program: Pass, arrays: Mapping[str, jax.Array], compute_capability: int | None = None) -> Arrays:
    """Every launch as a jax-triton call. compute_capability: compile for that GPU, where the machine has none.

    Raises RuntimeError where the assembler that jaxlib takes would make wrong code of the kernels.
    """
    call, out_keyword, options = _triton_call()
    if compute_capability is not None:
        options = {**options, "compute_capability": compute_capability}
    for capability in _capabilities() if compute_capability is None else ():
        more = assembler_options(capability)
        if "backend_options" in options:  # jax-triton before 0.4 takes no options of Triton
            options = {**options, "backend_options": {**options["backend_options"], **more}}
    env = {name: arrays[name] for name in program.inputs}
    for launch in program.launches:
        operands: list[Any] = []
        names = [name for name, x in launch.operands.items() if isinstance(x, str)]  # aliases count arrays alone
        for x in launch.operands.values():
            if isinstance(x, Descriptor):
                raise TypeError(f"{launch.name}: expected buffers and scalars, got a descriptor; jax-triton has none")
            operands.append(env[x] if isinstance(x, str) else x)
        outputs = call(
            *operands,
            kernel=launch.kernel,
            grid=(launch.grid,),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            input_output_aliases={names.index(x): tuple(launch.outputs).index(y) for x, y in launch.in_place},
            **{out_keyword: tuple(_struct(spec) for _, spec in launch.outputs.values())},
            **options,
            **launch.constexprs,
        )
        env.update(zip((buffer for buffer, _ in launch.outputs.values()), outputs, strict=True))
    return {name: env[name] for name in program.results}


@functools.cache
def _host_thread() -> ThreadPoolExecutor:
    """A thread for the interpreter: threads inherit their floating-point mode, and XLA's own flush subnormals."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="mlstm-interpreter")
    pool.submit(int).result()  # start it now, from the tracing thread
    return pool


def _on_host(
    program: Pass, outputs: Mapping[str, jax.ShapeDtypeStruct], inputs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The callback: run a pass in the interpreter's thread."""
    hosts = {}
    for name, x in inputs.items():
        host = np.ascontiguousarray(x)
        hosts[name] = interpreter.HostArray(host.ctypes.data, host.dtype.name, host)
    raw = _host_thread().submit(interpreter.run, program, hosts).result()
    return {name: x.view(outputs[name].dtype)[..., 0] for name, x in raw.items()}


def _interpret(program: Pass, arrays: Mapping[str, jax.Array]) -> Arrays:
    _host_thread()  # started here, with this thread's floating-point mode
    outputs = {name: _struct(program.spec(name)) for name in program.results}
    # One callback for each pass: JAX compiles an eager call once for each callback, and keeps both.
    callback = program.kept.setdefault(_on_host, functools.partial(_on_host, program, outputs))
    return jax.pure_callback(callback, outputs, {name: arrays[name] for name in program.inputs})


def _varying_axes(x: jax.Array) -> frozenset[str]:
    aval: Any = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))  # its name in JAX before 0.10


def varying(arrays: Mapping[str, jax.Array], *like: jax.Array) -> Arrays:
    """The arrays, marked inside `shard_map` as varying over each mesh axis that any of them (or of `like`) varies over.

    Neither a callback nor a Triton call tells JAX so for its outputs. Outside `shard_map` this does nothing.
    """
    axes = {name: _varying_axes(x) for name, x in arrays.items()}
    union = frozenset[str]().union(*axes.values(), *map(_varying_axes, like))
    return {
        name: jax.lax.pcast(x, tuple(union - axes[name]), to="varying") if union - axes[name] else x
        for name, x in arrays.items()
    }


def run(program: Pass, arrays: Mapping[str, jax.Array], backend: str) -> Arrays:
    """Execute a pass on contiguous arrays."""
    results = (_interpret if backend == "interpret" else launch_all)(program, arrays)
    return varying(results, *arrays.values())
