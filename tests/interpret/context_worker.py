"""What each of four processes does for test_context.py: without JAX, which takes long to import."""

import datetime
import functools
import math

import pytest
import torch
from torch import distributed

from frontend_torch import mlstm_chunkwise, mlstm_context_parallel, segments
from kernels_triton.context import exchanged_bytes
from tools.multi_gpu_torch import leave

WORLD = 4
LENGTHS = [17, 5, 9, 3]  # tokens of each process
NAMES = ("h", "c_last", "n_last", "m_last", "dq", "dk", "dv", "di", "df", "dc_initial", "dn_initial", "dm_initial")
LIMIT = 1e-5


def draw(lengths, layout="bhtd", states=True, dtype=torch.float32, i_mean=0.0, f_mean=4.0, V=5):
    """Inputs of the whole sequence, and cotangents of its outputs."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator)
    T = sum(lengths)
    tokens = [randn(1, 2, T, *dims) for dims in ((4,), (4,), (V,), (), (), (V,))]
    tokens[3] += i_mean
    tokens[4] += f_mean
    tokens[:3] = [x.to(dtype) for x in tokens[:3]]
    tokens[5] = tokens[5].to(dtype)
    tokens = [x.transpose(1, 2).contiguous() if layout == "bthd" else x for x in tokens]
    heads = [randn(1, 2, *dims) for dims in ((4, V), (4,), ()) * 2]
    return tokens[:5] + (heads[:3] if states else []), [tokens[5], *heads[3:]]


def together(function, tensors, cotangents):
    """Outputs and gradients of a function, of those cotangents that are given."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = (out[0], *out[1]) if isinstance(out, tuple) else (out,)
    driven = [(x, dx) for x, dx in zip(out, cotangents, strict=False) if dx is not None and x.requires_grad]
    outputs, given = map(list, zip(*driven, strict=True))
    gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    gradients = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, gradients, strict=True)]
    names = NAMES[: len(out)] + NAMES[4:]
    return dict(zip(names, (*(x.detach() for x in out), *gradients), strict=False))


def split(rank, lengths, tensors, cotangents, layout="bhtd", group=None, via=mlstm_context_parallel, **options):
    """Outputs and gradients of the segments, put together again. via: what calls the operator."""
    tokens = 1 if layout == "bthd" else 2
    own = [x.split(lengths, tokens)[rank] if n < 5 else x for n, x in enumerate(tensors)]
    # Of the last states' cotangents each process has a part.
    parts = [torch.full((), float(p + 1)) for p in range(len(lengths))]
    parts = [p / sum(parts) for p in parts]
    given = [
        cotangents[0].split(lengths, tokens)[rank],
        *(None if x is None else x * parts[rank] for x in cotangents[1:]),
    ]
    got = together(functools.partial(via, layout=layout, **options), own, given)
    found = {}
    for name, x in got.items():
        if name in ("c_last", "n_last", "m_last"):
            found[name] = x
            continue
        everyone = [None] * len(lengths)
        distributed.all_gather_object(everyone, x, group=group)
        if name.endswith("initial"):
            found[name] = sum(everyone)
        else:
            found[name] = torch.cat(everyone, tokens)
    return found


def errors(got, expected):
    """Relative Frobenius errors by name."""
    assert got.keys() == expected.keys()
    floor = torch.finfo(torch.float32).tiny
    return {n: float((got[n].double() - x.double()).norm() / (x.double().norm() + floor)) for n, x in expected.items()}


CASES = {
    "kernels": {},
    "ragged, h alone": {"layout": "bthd", "lengths": [5, 1, 18, 9], "states": False, "last": False},
    "detached, states again": {"normalizer_grad": "detached", "save_states": False},
    "closed gates": {"f_mean": -8.0},
    "long memory": {"f_mean": 12.0, "i_mean": -4.0},
    "sigmoid gate": {"input_gate": "sigmoid"},
    "sigmoid gate, a first state of no weight": {"input_gate": "sigmoid", "m_initial": -math.inf},
    "not normalised": {"input_gate": "sigmoid", "normalize": False},
    "large stabilisers": {"i_mean": 1e4, "states": False, "last": False},  # whose last digits C and n hold
    "reference": {"backend": "reference"},
    "reference, large stabilisers": {"backend": "reference", "i_mean": 1e4, "states": False, "last": False},
    "reference, sigmoid gate": {"backend": "reference", "input_gate": "sigmoid", "layout": "bthd"},
}


def case(rank, name):
    """Errors of the split sequence against the whole one."""
    options = {"backend": "interpret", "chunk_size": 16} | CASES[name]
    lengths = options.pop("lengths", LENGTHS)
    drawn = {x: options.pop(x) for x in ("states", "i_mean", "f_mean") if x in options}
    last = options.pop("last", True)
    tensors, cotangents = draw(lengths, options.get("layout", "bhtd"), **drawn)
    if "m_initial" in options:
        tensors[7] = torch.full_like(tensors[7], options.pop("m_initial"))
    cotangents = cotangents if last else cotangents[:1]
    options["return_last_states"] = last
    got = split(rank, lengths, tensors, cotangents, **options)
    if rank:
        return {}
    return errors(got, together(functools.partial(mlstm_chunkwise, **options), tensors, cotangents))


KERNELS = {"backend": "interpret", "chunk_size": 16, "return_last_states": True}


def subgroups(rank):
    """Pairs of processes, each pair with a sequence of its own: a mesh's axis as the group."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "tokens"))
    tensors, cotangents = draw([9, 5], i_mean=float(rank // 2))
    via = functools.partial(mlstm_context_parallel, group=mesh["tokens"], **KERNELS)
    got = split(rank % 2, [9, 5], tensors, cotangents, group=mesh["tokens"].get_group(), via=via)
    found = errors(got, together(functools.partial(mlstm_chunkwise, **KERNELS), tensors, cotangents))
    assert max(found.values()) < LIMIT, found


def checkpointed(rank):
    """Recomputed in the backward pass, and with saved tensors moved by hooks: the same bits, and as many bytes."""
    tensors, cotangents = draw([3] * WORLD)

    def run(via):
        counted.clear()
        return split(rank, [3] * WORLD, tensors, cotangents, via=via), list(counted)

    def via(*arrays, **options):
        call = functools.partial(mlstm_context_parallel, **options)
        return torch.utils.checkpoint.checkpoint(call, *arrays, use_reentrant=False, determinism_check="none")

    def moved(*arrays, **options):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x.clone()):
            return mlstm_context_parallel(*arrays, **options)

    counted = []
    gather = segments._all_gather

    def count(made, given, **options):
        counted.append(given.numel() * given.itemsize)
        gather(made, given, **options)

    segments._all_gather = count
    plain, sent = run(functools.partial(mlstm_context_parallel, **KERNELS))
    assert sent == list(exchanged_bytes(1, 2, 4, 5)), sent
    for way in (via, moved):
        got, _ = run(functools.partial(way, **KERNELS))
        assert all(torch.equal(got[name], x) for name, x in plain.items())
    segments._all_gather = gather


def compiled(rank):
    """Under torch.compile, in one graph, for a mesh too, and with lengths that vary: the same bits."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tokens",))
    for group, last in ((None, True), (mesh["tokens"], False)):
        options = KERNELS | {"group": group, "return_last_states": last}

        def layer(q, k, v, i, f, *states, layout, options=options):
            made = mlstm_context_parallel(2.0 * q, k, v, i, f, *states, layout=layout, **options)
            return (made[0] + 1.0, made[1]) if isinstance(made, tuple) else made + 1.0

        fast = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for lengths in (LENGTHS, [20, 6, 7, 4]):
            tensors, cotangents = draw(lengths)
            cotangents = cotangents if last else cotangents[:1]
            plain, got = (split(rank, lengths, tensors, cotangents, via=via) for via in (layer, fast))
            assert all(torch.equal(got[name], x) for name, x in plain.items()), lengths


def registered(rank):
    """The operators' schemas and fake results are those of the real ones; what cannot be, says so."""
    tensors, cotangents = draw(LENGTHS)
    own = [x.split(LENGTHS, 2)[rank] if n < 5 else x for n, x in enumerate(tensors)]
    options = (1e-6, 16, None, "exact", "bhtd", "ieee", True, "exponential", True, "interpret")
    group = distributed.group.WORLD.group_name
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for save, last in ((True, True), (False, False)):
        leaves = [x.clone().requires_grad_(save) for x in own]
        torch.library.opcheck(segments.segment, (*leaves, *options, group, save, last), test_utils=utilities)
    h, *results = segments.segment(*own, *options, group, True, True)
    dh = cotangents[0].split(LENGTHS, 2)[rank]
    given = (dh, *cotangents[1:], *own, h, *results[3:], *options, group, True)
    torch.library.opcheck(segments.segment_backward, given, test_utils=utilities)

    call = functools.partial(mlstm_context_parallel, **KERNELS)
    with pytest.raises(RuntimeError, match="expected a call outside of torch.func's transforms"):
        torch.func.vmap(call)(*(x[None] for x in own))
    by_reference = functools.partial(mlstm_context_parallel, backend="reference")
    with pytest.raises(Exception, match="'reference' expected an eager call of mlstm_context_parallel"):
        torch.compile(by_reference, backend="eager", fullgraph=True)(*own)


def alone(rank):
    """Segments that tell each other nothing: the measure of these tests sees it."""
    tensors, cotangents = draw(LENGTHS)
    got = split(rank, LENGTHS, tensors, cotangents, via=functools.partial(mlstm_chunkwise, **KERNELS))
    found = errors(got, together(functools.partial(mlstm_chunkwise, **KERNELS), tensors, cotangents))
    assert min(found[name] for name in ("h", "dq", "dk", "dv", "di", "df", "dc_initial")) > 1e-2, found


def work(rank, file):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)  # for a process that does not come to an exchange: an error, not a hang
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD, timeout=wait)
    for check in (subgroups, checkpointed, compiled, registered, alone):
        check(rank)
    for name in CASES:
        found = case(rank, name)
        if rank == 0:
            print(f"{name:24}", *(f"{n} {x:.1e}" for n, x in found.items()), flush=True)
            assert max(found.values()) < LIMIT, (name, found)
    leave()
