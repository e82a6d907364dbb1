"""Triton's own dispatch and launcher on a machine without a GPU, over stub_driver.c; for a process of its own."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

FIELDS = ("function", "grid", "threads", "shared", "maps", "first", "second", "third")


def build(folder: pathlib.Path) -> pathlib.Path:
    """The stub as libcuda.so.1. Raises RuntimeError without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise RuntimeError("cc: expected a C compiler, as Triton's launcher needs one too; found none")
    source = pathlib.Path(__file__).with_name("stub_driver.c")
    library = folder / "libcuda.so.1"
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", soname, "-o", library, source], check=True)
    return library


def activate(library: pathlib.Path, capability: int = 90) -> ctypes.CDLL:
    """Make the stub Triton's driver, for tensors in the CPU's memory. Before anything else asks Triton for one."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    handles: dict[bytes, int] = {}

    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, handles.setdefault(binary, len(handles) + 1), 32, 0, 1024

    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # the stub has only those of the driver's functions that launching calls
    cuda = nvidia.CudaUtils()
    sys.setdlopenflags(flags)
    cuda.load_binary = load_binary
    cuda.get_device_properties = lambda device: {"max_shared_mem": 232448}

    class Driver:
        utils, launcher_cls = cuda, nvidia.CudaLauncher
        get_current_stream = staticmethod(lambda index: 0)
        get_current_device = staticmethod(lambda: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        map_python_to_cpp_type = staticmethod(nvidia.ty_to_cpp)

    driver.set_active(Driver())
    return stub


def launches(stub: ctypes.CDLL) -> list[dict[str, int]]:
    """What the driver was asked to launch: FIELDS, of which the last three are the first parameters' addresses."""
    stub.stub_launches.restype = ctypes.POINTER(ctypes.c_uint64)
    raw, count = stub.stub_launches(), stub.stub_count()
    rows = [raw[n * len(FIELDS) : (n + 1) * len(FIELDS)] for n in range(count)]
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]
