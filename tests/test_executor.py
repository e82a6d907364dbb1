"""The PyTorch executor's second run: compiled kernels on plain addresses, small buffers in one piece of memory."""

import dataclasses
import itertools
import math

import pytest
import torch

from frontend_torch import executor
from kernels_triton import plan
from kernels_triton.launch import SMALL, WIDTHS
from tests.test_plan import problem


class Compiled:
    """Stands for a compiled kernel: keeps the arguments that it is launched with."""

    packed_metadata = ()

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.calls.append((self.name, arguments))


class Kernel:
    """Stands for a kernel: the first launch compiles it."""

    def __init__(self, fn, calls):
        self.fn, self.calls = fn, calls

    def __getitem__(self, grid):
        def first(*arguments, **_):
            self.calls.append((self.fn.__name__, arguments))
            return Compiled(self.fn.__name__, self.calls)

        return first


def recorded(program, calls):
    """The pass with kernels that only keep their arguments."""
    launches = tuple(dataclasses.replace(x, kernel=Kernel(x.kernel.fn, calls)) for x in program.launches)
    return dataclasses.replace(program, launches=launches)


@pytest.fixture
def calls(monkeypatch):
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", type("Stream", (), {"get_current_stream": lambda self, index: 0})())
    return []


def inputs(p):
    dims = {"q": p.K, "k": p.K, "v": p.V, "dh": p.V}
    found = {n: torch.empty(p.B, p.H, p.T, D, dtype=getattr(torch, p.dtype)) for n, D in dims.items()}
    found |= {n: torch.empty(p.B, p.H, p.T) for n in ("i", "f")}
    states = {"c_initial": (p.K, p.V), "n_initial": (p.K,), "m_initial": ()}
    return found | {n: torch.empty(p.B, p.H, *shape) for n, shape in states.items()}


def addresses(launch, arguments):
    """The address of each buffer that a launch was given."""
    given = zip(launch.arguments, arguments, strict=False)
    return {x: y if isinstance(y, int) else y.data_ptr() for x, y in given if isinstance(x, str)}


# The longer one takes gates in two launches and scans in segments.
@pytest.mark.parametrize("dtype, T", [("float32", 300), ("bfloat16", 300), ("bfloat16", 3000)])
def test_the_second_run_reads_what_the_first_would(calls, dtype, T):
    """In both runs each buffer has one address; the backward pass finds those that the forward pass saved."""
    p = problem(1, 2, T, 32, 32, dtype=dtype)
    forward, backward = (recorded(x, calls) for x in (plan.forward_pass(p), plan.backward_pass(p)))
    given = inputs(p)
    for _ in range(2):
        calls.clear()
        results = executor.launch_all(forward, given)
        env = {**given, **results}
        gradients = executor.launch_all(backward, env, earlier=forward)
        assert list(gradients) == list(backward.results)
        known = {name: x.data_ptr() for name, x in env.items()}
        start = results[executor.SAVED].data_ptr()
        known |= {name: start + place for name, place in forward.arenas[0].places.items()}
        for program, made in ((forward, calls[: len(forward.launches)]), (backward, calls[len(forward.launches) :])):
            own = dict(known)
            for launch, (_, arguments) in zip(program.launches, made, strict=True):
                for name, address in addresses(launch, arguments).items():
                    assert own.setdefault(name, address) == address, (launch.name, name)
        assert {name: x.data_ptr() for name, x in gradients.items()}.items() <= own.items()
    assert all(isinstance(x, int) for _, arguments in calls for x in arguments[:1])  # the run on addresses


def test_one_name_is_one_buffer():
    """A pass that creates two buffers of one name is refused: the second would take the first one's memory."""
    p = plan.forward_pass(problem(1, 2, 40, 16, 16), False)
    gates, *others = p.launches
    (parameter, (_, spec)), *_ = others[0].outputs.items()
    clash = dataclasses.replace(others[0], outputs={**others[0].outputs, parameter: (next(iter(gates.outputs)), spec)})
    with pytest.raises(TypeError, match=f"{clash.name}: .*: expected Spec.* as before, got Spec"):
        dataclasses.replace(p, launches=(gates, clash))


def test_a_misaligned_input_is_compiled_for(calls):
    """Compiled kernels count on alignment: other inputs take Triton's own dispatch each time."""
    p = problem(1, 2, 40, 16, 16)
    forward = recorded(plan.forward_pass(p, False), calls)
    given = inputs(p)
    given["q"] = torch.empty(given["q"].numel() + 1)[1:].view(given["q"].shape)
    for _ in range(2):
        calls.clear()
        executor.launch_all(forward, given)
        assert all(isinstance(arguments[0], torch.Tensor) for _, arguments in calls)


@pytest.mark.parametrize("T", [40, 20000])
def test_places(T):
    """Small buffers do not overlap; what users get is memory of its own; large buffers are too."""
    p = problem(1, 2, T, 64, 64)
    for program in (plan.forward_pass(p), plan.backward_pass(p)):
        public = set(program.results) - set(program.saved)
        for arena in program.arenas:
            sizes = {n: math.prod(program.spec(n).shape) * WIDTHS[program.spec(n).dtype] for n in arena.places}
            assert not public & arena.places.keys()
            assert all(place % 256 == 0 for place in arena.places.values()) and max(sizes.values(), default=0) <= SMALL
            ends = sorted((place, place + sizes[name]) for name, place in arena.places.items())
            assert all(x[1] <= y[0] for x, y in itertools.pairwise(ends))
            assert not ends or ends[-1][1] <= arena.size < ends[-1][1] + 256
    names = [set(arena.places) for arena in plan.forward_pass(p).arenas]
    assert not names[0] & names[1]
    assert ("states" in names[0]) == (T == 40)  # 8 KiB a chunk and head


def test_no_arena_beside_descriptors():
    """Descriptors are made of tensors, and passes that read them are large."""
    p = dataclasses.replace(problem(1, 4, 4096, 128, 256, dtype="bfloat16"), descriptors=True)
    assert [arena.size for arena in plan.forward_pass(p).arenas] == [0, 0]
