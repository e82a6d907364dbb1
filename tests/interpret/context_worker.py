"""What each of four processes does for test_context.py: without JAX, which takes long to import."""

import functools

import torch
from torch import distributed

from frontend_torch import mlstm_chunkwise, mlstm_context_parallel

WORLD = 4
NAMES = ("h", "c_last", "n_last", "m_last", "dq", "dk", "dv", "di", "df", "dc_initial", "dn_initial", "dm_initial")
LIMIT = 1e-5


def draw(lengths, layout="bhtd", states=True, dtype=torch.float32, i_mean=0.0, f_mean=1.0, V=5):
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


def split(rank, lengths, tensors, cotangents, layout="bhtd", group=None, function=mlstm_context_parallel, **options):
    """Outputs and gradients of the segments, put together again."""
    tokens = 1 if layout == "bthd" else 2
    own = [x.split(lengths, tokens)[rank] if n < 5 else x for n, x in enumerate(tensors)]
    # Of the last states' cotangents each process has a part.
    parts = [torch.full((), float(p + 1)) for p in range(len(lengths))]
    parts = [p / sum(parts) for p in parts]
    given = [cotangents[0].split(lengths, tokens)[rank], *(None if x is None else x * parts[rank] for x in cotangents[1:])]
    run = functools.partial(function, layout=layout, group=group, **options)
    got = together(run, own, given)
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
    "kernels": {"backend": "interpret", "chunk_size": 16},
    "bthd, ragged": {"backend": "interpret", "chunk_size": 16, "layout": "bthd", "lengths": [17, 1, 34, 9]},
    "no initial states": {"backend": "interpret", "chunk_size": 16, "states": False},
    "h alone": {"backend": "interpret", "chunk_size": 16, "last": False},
    "states again": {"backend": "interpret", "chunk_size": 16, "save_states": False, "lengths": [17] * 4},
    "closed gates": {"backend": "interpret", "chunk_size": 16, "f_mean": -8.0, "i_mean": -20.0},
    "long memory": {"backend": "interpret", "chunk_size": 16, "f_mean": 12.0, "i_mean": -4.0},
    "detached": {"backend": "interpret", "chunk_size": 16, "normalizer_grad": "detached"},
    "sigmoid": {"backend": "interpret", "chunk_size": 16, "input_gate": "sigmoid"},
    "plain": {"backend": "interpret", "chunk_size": 16, "input_gate": "sigmoid", "normalize": False},
    "reference": {"backend": "reference", "chunk_size": 16},
    "reference, sigmoid": {"backend": "reference", "input_gate": "sigmoid", "layout": "bthd", "lengths": [9, 3, 1, 7]},
}


def case(rank, name):
    """Errors of the split sequence against the whole one."""
    options = dict(CASES[name])
    lengths = options.pop("lengths", [18] * WORLD)
    drawn = {x: options.pop(x) for x in ("states", "i_mean", "f_mean") if x in options}
    last = options.pop("last", True)
    tensors, cotangents = draw(lengths, options.get("layout", "bhtd"), **drawn)
    cotangents = cotangents if last else cotangents[:1]
    options["return_last_states"] = last
    got = split(rank, lengths, tensors, cotangents, **options)
    if rank:
        return {}
    return errors(got, together(functools.partial(mlstm_chunkwise, **options), tensors, cotangents))


def work(rank, file):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    for name in CASES:
        found = case(rank, name)
        if rank == 0:
            print(f"{name:20}", *(f"{n} {x:.1e}" for n, x in found.items()), flush=True)
            assert max(found.values()) < LIMIT, (name, found)
    distributed.destroy_process_group()
