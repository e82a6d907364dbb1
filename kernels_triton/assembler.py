"""Chooses the assembler (ptxas) for our kernels on NVIDIA GPUs, and refuses one that makes wrong code of them.

ptxas 12.8, which Triton 3.6 and 3.7 use on Hopper (sm_90), miscompiles these kernels: garbage or an illegal memory
access, mostly for odd V above 96. So our kernels are compiled with

1. the ptxas that the user chose for Triton (`TRITON_PTXAS_PATH`, or `triton.knobs.nvidia.ptxas`), if any;
2. else the newest one that the GPU's driver can load code of, among those in Triton's wheel, in NVIDIA's
   nvidia-cuda-nvcc wheels, and in a CUDA toolkit (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, /opt/cuda).

On Hopper one older than 12.9 is refused with a RuntimeError before anything is launched. Other people's Triton kernels
in the same process keep their assembler: nothing global is changed, not even while ours compile.

JAX does not let Triton assemble: jaxlib looks for a ptxas of its own (`found_by_xla`), which is refused likewise.

MLSTM_UNSAFE_OLD_PTXAS=1, set before Python starts, leaves the choice to Triton and lifts the refusal. It is for testing
alone: it lets tools.fuzz show that it finds the fault.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOPPER = 90  # the compute capability
OLDEST = (12, 9, 0)  # on Hopper; of 12.8 there is proof, and those before it are unknown
FIRST = 75  # the oldest compute capability that CUDA 13 assembles for
UNSAFE = "MLSTM_UNSAFE_OLD_PTXAS"
TOOLKITS = ("/usr/local/cuda", "/opt/cuda")  # where a CUDA toolkit is installed
XLA_OLDEST, XLA_EXCLUDED = (11, 8, 0), (12, 3, 103)  # XLA itself passes over anything older, and over this one


@dataclass(frozen=True)
class Assembler:
    """A ptxas: its file, what it answers to --version, and the version therein, such as (12, 9, 86)."""

    path: str
    banner: str
    version: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"ptxas {'.'.join(map(str, self.version))}"

    def __str__(self) -> str:
        return f"{self.name} ({self.path})"

    @property
    def release(self) -> str:
        """As CUDA's releases are called: 12.9."""
        return f"{self.version[0]}.{self.version[1]}"


def parse_version(banner: str) -> tuple[int, int, int] | None:
    """The version in what ptxas prints, (12, 9, 86) of "V12.9.86" or (12, 9, 0) of "release 12.9"; None without one."""
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)\b", banner)
    if found:
        return int(found[1]), int(found[2]), int(found[3])
    found = re.search(r"\brelease (\d+)\.(\d+)\b", banner)
    return (int(found[1]), int(found[2]), 0) if found else None


@functools.lru_cache(maxsize=256)
def _read(path: str, _changed: tuple[int, int]) -> Assembler | None:
    """Asks the file for its version, once as long as it does not change."""
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):  # not executable, of another machine, never ends
        return None
    version = parse_version(run.stdout) if run.returncode == 0 else None
    return Assembler(path, run.stdout, version) if version else None


def read(path: str | Path) -> Assembler | None:
    """The assembler in a file; None if the file is missing, does not run or does not say which version it is."""
    path = os.path.abspath(path)  # a bare name would be looked for on PATH
    try:
        file = os.stat(path)
    except OSError:
        return None
    return _read(path, (file.st_mtime_ns, file.st_size))


def candidates() -> Iterator[Path]:
    """Where a ptxas may be: in Triton's wheel, in NVIDIA's, in a CUDA toolkit. Files that may not exist."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    yield from (shipped / "ptxas", shipped / "ptxas-blackwell")
    nvidia = importlib.util.find_spec("nvidia")  # a namespace, of all of NVIDIA's wheels
    for root in (nvidia and nvidia.submodule_search_locations) or ():
        yield from sorted(Path(root).glob("*/bin/ptxas"))  # cuda_nvcc of CUDA 12, cu13 of CUDA 13
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name], "bin", "ptxas")
    on_path = shutil.which("ptxas")
    if on_path:
        yield Path(on_path)
    yield from (Path(root, "bin", "ptxas") for root in TOOLKITS)


@functools.cache
def driver_release() -> int | None:
    """The CUDA release of the GPU's driver, 12 or 13 say; None where there is none to ask."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else version.value // 1000


def newest(paths: Iterable[str | Path], driver: int | None = None) -> Assembler | None:
    """The newest assembler among files, the first of several as new; None if there is none.

    driver: the CUDA release (12, 13) of the GPU's driver. A driver loads the code of its own release's assemblers and
    of older ones; later ones are taken only where there is nothing else.
    """
    found = [x for x in map(read, paths) if x]
    loaded = [x for x in found if driver is None or x.version[0] <= driver]
    return max(loaded or found, key=lambda x: x.version, default=None)


def users_choice(arch: int) -> tuple[str, str] | None:
    """The variable and the path of the assembler that the user set for Triton, for a compute capability (90).

    Triton up to 3.8 reads the second variable from Blackwell on, 3.9 from Hopper on: on Hopper either counts.
    """
    from triton import knobs

    blackwell = ("ptxas_blackwell",)
    for name in blackwell if arch >= 100 else ("ptxas", *(blackwell if arch == HOPPER else ())):
        variable = type(knobs.nvidia).__dict__[name].key
        path = vars(knobs.nvidia).get(name) or os.environ.get(variable)
        if path:
            return variable, str(path)
    return None


def unsafe() -> bool:
    """Whether the refusal is lifted, for testing."""
    return os.environ.get(UNSAFE, "0").lower() not in ("", "0", "false", "off", "no")


def _tritons_own(arch: int) -> Any:
    """Triton's NvidiaTool: its assembler for a compute capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(arch)


def check(found: Assembler, arch: int, remedy: str) -> None:
    """Raises RuntimeError if an assembler makes wrong code of these kernels for a compute capability."""
    if arch == HOPPER and found.version < OLDEST and not unsafe():
        raise RuntimeError(
            f"ptxas: expected version {OLDEST[0]}.{OLDEST[1]} or newer on Hopper (sm_{arch}), got "
            f"{'.'.join(map(str, found.version))} at {found.path}, which miscompiles the mLSTM kernels (wrong results, "
            f"illegal memory accesses); {remedy} (docs/versions.md)"
        )


def choose(arch: int) -> Assembler:
    """The assembler that our kernels are compiled with for a compute capability, such as 90.

    Raises RuntimeError if there is none, if the user's choice is not one, or if the GPU must not run what it makes.
    """
    users = None if unsafe() else users_choice(arch)
    if users:
        variable, path = users
        found = read(shutil.which(path) or path)
        if found is None:
            raise RuntimeError(
                f"{variable}: expected the path of a ptxas that runs and says its version, got {path}; "
                f"correct or unset {variable}"
            )
        remedy = f"unset {variable}, or set it to a newer one"
    else:
        as_triton = unsafe() or arch < FIRST
        found = read(_tritons_own(arch).path) if as_triton else newest(candidates(), driver_release())
        if found is None:
            raise RuntimeError("ptxas: expected one in Triton's wheel, in nvidia-cuda-nvcc or on PATH, found none")
        release = driver_release() or 13
        wheel = "'nvidia-cuda-nvcc-cu12>=12.9'" if release == 12 else "nvidia-cuda-nvcc"
        remedy = f"pip install {wheel}, or set TRITON_PTXAS_PATH to a newer ptxas"
    check(found, arch, remedy)
    return found


def tritons_ptx_version(arch: int) -> int:
    """The version of PTX that Triton compiles to by itself, 87 for 8.7: the newest that its own assembler knows."""
    from triton.backends.nvidia.compiler import ptx_get_version

    return int(ptx_get_version(_tritons_own(arch).version))


def ptx_version(found: Assembler, arch: int) -> int:
    """The version of PTX to compile to, 87 for 8.7: what Triton would choose, if the assembler knows it.

    Not the assembler's newest: JAX gets what Triton chooses, and the two frontends must compile the same code.
    """
    from triton.backends.nvidia.compiler import ptx_get_version

    return min(tritons_ptx_version(arch), int(ptx_get_version(found.release)))


def _looking_up(function: Any, **names: Any) -> Any:
    """A copy of one of Triton's functions that finds other values under these global names. The original stays."""
    missing = names.keys() - set(function.__code__.co_names)
    if missing:
        import triton

        raise RuntimeError(
            f"triton: expected a version from 3.6 to 3.9, whose {function.__qualname__} looks up "
            f"{', '.join(sorted(missing))}; got {triton.__version__}, which does not"
        )
    scope = {**function.__globals__, **names}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _backend_with(found: Assembler, target: Any) -> Any:
    """Triton's backend for an NVIDIA target, but with this assembler, of which its key in the cache on disk tells."""
    from triton import knobs
    from triton.compiler.compiler import make_backend

    base = type(make_backend(target))
    tool = knobs.NvidiaTool(found.path, found.release)

    class Backend(base):  # type: ignore[misc, valid-type]
        make_cubin = _looking_up(base.make_cubin, get_ptxas=lambda arch: tool)

        def hash(self) -> str:
            return f"{found.banner}-{self.target.arch}"

    return Backend(target)


def compile_kernel(src: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> Any:
    """`triton.compile`, with the chosen assembler. Raises RuntimeError if the GPU must not run what it makes."""
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    target = target or driver.active.get_current_target()
    if target.backend != "cuda" or unsafe():
        return compiler.compile(src, target=target, options=options, _env_vars=_env_vars)
    found = choose(target.arch)
    options = dict(options or {})
    if options.get("ptx_version") is None:
        options["ptx_version"] = ptx_version(found, target.arch)
    backend = _backend_with(found, target)
    compile_it = _looking_up(compiler.compile, make_backend=lambda _: backend)
    return compile_it(src, target=target, options=options, _env_vars=_env_vars)


@functools.cache
def _kinds() -> tuple[type, type]:
    """Triton's kernels, and ours."""
    from triton.runtime.jit import JITFunction

    class NewestAssembler(JITFunction):  # type: ignore[misc]
        """A kernel that is compiled with the chosen assembler, whoever launches it."""

        # Triton sets this to its own whenever a device is new: that is passed over.
        compile = property(lambda self: compile_kernel, lambda self, _: None)

    return JITFunction, NewestAssembler


def ours(kernel: Any) -> Any:
    """The same kernel, from now on compiled with the chosen assembler. Anything else but a kernel of Triton's stays.

    What was compiled of it before is forgotten.
    """
    caches = getattr(kernel, "device_caches", None)
    if caches is not None:  # neither the interpreter's nor a test's
        plain, newest_assembler = _kinds()
        if type(kernel) is plain:
            kernel.__class__ = newest_assembler
            caches.clear()
    return kernel


def xla_candidates(folder: str | Path) -> Iterator[Path]:
    """Where jaxlib looks for the ptxas of Triton kernels, in its order; the first that runs is taken, however old.

    As XLA's FindCudaExecutable and CandidateCudaRoots do (xla/stream_executor/cuda/subprocess_compilation.cc, tsl's
    cuda_root_path.cc), called without a preferred folder; without Bazel's. folder: of the plugin's _triton.so.
    """
    yield Path("bin", "ptxas")
    yield from (Path(x, "ptxas") for x in os.environ.get("PATH", "").split(":"))
    roots = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    roots += [Path(root) for root in TOOLKITS]
    wheel = "cu13" if "cuda13" in Path(folder).name else "cuda_nvcc"
    roots += [Path(folder, x) for x in (f"../nvidia/{wheel}", f"../../nvidia/{wheel}", "cuda")]
    roots += [Path(folder, x) for x in ("../../../..", "../../../../..")]
    yield from (root / "bin" / "ptxas" for root in roots)


def found_by_xla(folder: str | Path) -> Assembler | None:
    """The assembler that jaxlib takes for Triton kernels; None if there is none. folder: of the plugin's _triton.so."""
    each = (read(x) for x in xla_candidates(folder))
    return next((x for x in each if x and x.version >= XLA_OLDEST and x.version != XLA_EXCLUDED), None)


XLA_REMEDY = "put the folder of a newer ptxas first on PATH, or upgrade the nvidia-cuda-nvcc wheel beside jaxlib"
