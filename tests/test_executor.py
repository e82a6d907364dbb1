"""The PyTorch executor's second run: compiled kernels on plain addresses, small buffers in one piece of memory."""

import dataclasses
import itertools
import math
import weakref

import pytest
import torch

from frontend_torch import executor
from kernels_triton import packing, plan
from kernels_triton.launch import SMALL, WIDTHS, Descriptor
from tests.test_plan import problem


class Compiled:
    """Stands for a compiled kernel: keeps the arguments that it is launched with."""

    packed_metadata = ()

    def __init__(self, name, calls):
        self.name, self.calls = name, calls
        self.function = f"function of {name}"

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        assert (y, z, stream, function, metadata) == (1, 1, 0, self.function, self.packed_metadata)
        assert launch_metadata is None and enter_hook is None and exit_hook is None
        self.calls.append((self.name, arguments))


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
    given = ((x.buffer, y.base) if isinstance(x, Descriptor) else (x, y) for x, y in given if not isinstance(x, int))
    return {x: y if isinstance(y, int) else y.data_ptr() for x, y in given}


# The longer one takes gates in two launches and scans in segments.
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "dtype, T, descriptors",
    [("float32", 300, False), ("bfloat16", 300, False), ("bfloat16", 3000, False), ("bfloat16", 3000, True)],
)
def test_the_second_run_reads_what_the_first_would(calls, dtype, T, descriptors, last):
    """In both runs each buffer has one address; the backward pass finds those that the forward pass saved."""
    p = dataclasses.replace(problem(1, 2, T, 32, 32, dtype=dtype), descriptors=descriptors)
    plans = plan.forward_pass(p, True, None, False, last), plan.backward_pass(p, None, False)
    forward, backward = (recorded(x, calls) for x in plans)
    given = inputs(p)
    runs = []
    for _ in range(3):
        calls.clear()
        results = executor.launch_all(forward, given)
        assert ("m_last" in results) == last
        env = {**given, **results}
        gradients = executor.launch_all(backward, env, earlier=forward)
        assert list(gradients) == list(backward.results)
        known = {name: x.data_ptr() for name, x in env.items()}
        if executor.SAVED in results:
            start = results[executor.SAVED].data_ptr()
            known |= {name: start + place for name, place in forward.arenas[0].places.items()}
        for program, made in ((forward, calls[: len(forward.launches)]), (backward, calls[len(forward.launches) :])):
            own = dict(known)
            for launch, (_, arguments) in zip(program.launches, made, strict=True):
                for name, address in addresses(launch, arguments).items():
                    assert own.setdefault(name, address) == address, (launch.name, name)
        assert {name: x.data_ptr() for name, x in gradients.items()}.items() <= own.items()
        runs.append([(name, arguments) for name, arguments in calls])
    first, *later = runs
    for run in later:
        for launch, (_, with_tensors), (_, with_addresses) in zip(
            forward.launches + backward.launches, first, run, strict=True
        ):
            buffers = [n for n, x in enumerate(launch.arguments) if isinstance(x, str)]
            assert all(type(with_addresses[n]) is int for n in buffers)
            scalars = [n for n, x in enumerate(launch.arguments) if isinstance(x, int)]
            assert [repr(with_addresses[n]) for n in scalars] == [repr(with_tensors[n]) for n in scalars]
            constants = with_addresses[len(launch.arguments) :]
            assert list(map(repr, constants)) == list(map(repr, launch.constants))


@pytest.mark.parametrize("descriptors, backward", [(False, False), (True, False), (True, True)])
def test_what_is_spent_is_freed(calls, monkeypatch, descriptors, backward):
    """Before each launch of a later run only those buffers are there that it or a later one needs."""
    p = dataclasses.replace(problem(1, 16, 3000, 128, 256, dtype="bfloat16"), descriptors=descriptors)
    given, earlier = inputs(p), None
    if backward:
        earlier = recorded(plan.forward_pass(p), calls)
        given |= executor.launch_all(earlier, given)
        program = recorded(plan.backward_pass(p), calls)
    else:
        program = recorded(plan.forward_pass(p, False, None, False, False), calls)
    made, there, empty = [], [], torch.empty

    def watched(*arguments, **options):
        x = empty(*arguments, **options)
        made.append(weakref.ref(x))
        return x

    class Watching(list):
        def append(self, _):
            there.append(sum(x() is not None for x in made))

    monkeypatch.setattr(torch, "empty", watched)
    monkeypatch.setattr(Compiled, "run", lambda *_: Watching().append(0))
    program = recorded(program, calls)
    for _ in range(2):
        made.clear()
        there.clear()
        executor.launch_all(program, given, earlier=earlier)
    placed = {name for arena in program.arenas for name in arena.places}
    own, expected = set(), []
    for launch, spent in zip(program.launches, program.spent, strict=True):
        own |= {buffer for buffer, _ in launch.outputs.values()} - placed
        expected.append(len(own) + sum(arena.size > 0 for arena in program.arenas))
        own -= set(spent)
    assert there == expected and own == set(program.results) and len(set(expected)) > 1


def test_results_in_given_tensors(calls):
    """A later run too writes where it is told to, and nowhere else."""
    p = dataclasses.replace(problem(1, 2, 1, 32, 32), form="recurrent")
    program = recorded(plan.forward_pass(p, False), calls)
    given = inputs(p)
    for _ in range(2):
        out = {"c_last": torch.empty(1, 2, 32, 32), "m_last": torch.empty(1, 2)}
        calls.clear()
        results = executor.launch_all(program, given, out)
        assert all(results[name] is x for name, x in out.items())
        ((_, arguments),) = calls
        where = addresses(program.launches[0], arguments)
        assert {n: where[n] for n in plan.LAST} == {n: results[n].data_ptr() for n in plan.LAST}


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


def test_another_dtype_is_compiled_for(calls):
    """Offsets may be of two dtypes, which one plan serves: a kernel compiled for one is not launched on the other."""
    program = recorded(packing.table_pass(300, 2, 64), calls)
    offsets = torch.tensor([0, 100, 300])
    for _ in range(2):
        for dtype in (torch.int32, torch.int64):
            executor.launch_all(program, {"cu_seqlens": offsets.to(dtype)})
    kinds = [type(arguments[0]) for _, arguments in calls]
    assert kinds == [torch.Tensor, torch.Tensor, int, int]


def test_saved_memory_brought_back_at_any_address(calls):
    """Hooks may put it anywhere: kernels compiled for aligned addresses get such."""
    p = problem(1, 2, 40, 16, 16)
    forward, backward = (recorded(x, calls) for x in (plan.forward_pass(p), plan.backward_pass(p)))
    env = inputs(p)
    env |= executor.launch_all(forward, env)
    for _ in range(2):
        saved = env[executor.SAVED]
        moved = torch.empty(saved.numel() + 1, dtype=torch.uint8)[1:].copy_(saved)
        calls.clear()
        executor.launch_all(backward, env | {executor.SAVED: moved}, earlier=forward)
    pairs = zip(backward.launches, calls, strict=True)
    given = [x for launch, (_, arguments) in pairs for x in addresses(launch, arguments).values()]
    assert given and all(x % executor.ALIGNMENT == 0 for x in given)


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


def test_descriptors_change_no_place():
    """Small buffers lie where they do in a pass by pointers: a descriptor takes any address."""
    p = problem(1, 4, 4096, 128, 256, dtype="bfloat16")
    through = dataclasses.replace(p, descriptors=True)
    for make in (plan.forward_pass, plan.backward_pass):
        assert make(through).arenas == make(p).arenas
        assert any(arena.size for arena in make(p).arenas)
