"""The operator where something else than eager autograd sees it: compilers, transforms, modes, autocast, export."""

import contextlib
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import frontend_torch
from frontend_torch import (
    calls,
    cu_seqlens_from_document_ids,
    library,
    make_chunk_table,
    mlstm_chunkwise,
    mlstm_recurrent,
    mlstm_step,
)
from tests.support import INPUTS, Case, make_case, named, run, same_bits, to_torch, torch_results

SMALL = {"H": 1, "T": 19, "K": 4, "V": 4, "chunk_size": 16}
OPTIONS = {
    "eps": 1e-6,
    "chunk_size": 16,
    "qk_scale": None,
    "normalizer_grad": "exact",
    "layout": "bhtd",
    "precision": "ieee",
    "save_states": True,
    "input_gate": "exponential",
    "normalize": True,
    "backend": "interpret",
    "form": "chunkwise",
}
# Arguments of the registered operator: what differs from OPTIONS, and what from a case without initial states.
CALLS = {
    "plain": ({}, {}),
    "states": ({}, {"states": True}),
    "recurrent": ({"form": "recurrent", "chunk_size": None}, {"states": True, "T": 3}),
    "no-normaliser": ({"input_gate": "sigmoid", "normalize": False}, {"states": True}),
    "detached-bfloat16": ({"normalizer_grad": "detached", "save_states": False}, {"dtype": "bfloat16"}),
    "tokens-first": ({}, {"B": 2, "H": 2}),
    "packed": ({"layout": "bthd"}, {"states": True, "N": 3, "layout": "bthd"}),
}


def call(name):
    """A registered operator's arguments, tensors that require gradients."""
    changes, shape = CALLS[name]
    case = make_case(**{"states": False, "H": 1, "T": 19, "K": 4, "V": 4, **shape})
    tensors = [to_torch(case.arrays[x]) if x in case.arrays else None for x in INPUTS]
    if name == "tokens-first":
        tensors = [x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    # Lengths that leave no chunk without tokens: what is saved of such is never written, nor read.
    offsets = torch.tensor([0, 17, 18, 19]) if name == "packed" else None
    tensors = [x if x is None else x.requires_grad_() for x in tensors]
    return (*tensors, offsets, None, *(OPTIONS | changes).values())


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_forward(name):
    torch.library.opcheck(library.chunkwise, (*call(name), True))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_backward(name):
    arguments = call(name)
    h, *made = (x.detach() for x in library.chunkwise(*arguments, True))
    tensors = [x if x is None else x.detach() for x in arguments[:10]]
    cotangents = [torch.randn_like(x) for x in (h, *made[:3])]
    made = [h, *made[:2], *made[3:]]
    torch.library.opcheck(library.chunkwise_backward, (*cotangents, *tensors, *made, *arguments[10:]))


def test_opcheck_without_saving():
    torch.library.opcheck(library.chunkwise, (*(x.detach() for x in call("states")[:8]), *call("states")[8:], False))


def test_opcheck_chunk_table():
    torch.library.opcheck(torch.ops.mlstm_dual.chunk_table.default, (torch.tensor([0, 5, 19]), 19, 16, "interpret"))


def small(**options) -> Case:
    return make_case(**{**SMALL, **options})


def via_compile(**how):
    """For `run`: the operator, compiled whole."""
    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, **how)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"layout": "bthd"}, {"states": False, "dtype": "bfloat16"}], ids=str)
def test_compile(backend, options):
    case = small(**options)
    same_bits(run("torch", case, "interpret", via_compile(backend=backend)), run("torch", case, "interpret"))


@pytest.mark.parametrize("name", ["importlib.util.find_spec", "torch.amp.is_autocast_available"])
def test_a_call_asks_nothing_that_older_compilers_cannot_trace(name, monkeypatch):
    """PyTorch 2.11, the least version, breaks its graph there; the version that runs this may not."""
    case = small(T=18)  # of a length that no earlier call has settled
    run("torch", small(), "interpret")
    monkeypatch.setattr(calls, "_calls", {})

    def fail(*_):
        raise AssertionError(name)

    monkeypatch.setattr(name, fail)
    for backend in ("interpret", "reference"):
        run("torch", case, backend)


def test_compile_for_any_length():
    """One graph for all lengths beyond a chunk, one for those up to a chunk, and eager's bits."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def function(**arrays):
        return mlstm_chunkwise(**arrays, backend="interpret", chunk_size=16, return_last_states=True)

    def marked(**arrays):
        for name in INPUTS[:5]:
            torch._dynamo.mark_dynamic(arrays[name], 2)
        return function(**arrays)

    graphs = []
    for T in (19, 48, 33, 16, 5):
        case = small(T=T)
        same_bits(run("torch", case, "interpret", lambda _: marked), run("torch", case, "interpret"))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 2, 2]


def test_compile_a_layer():
    """Between other operations, with inputs that are views; under autocast too."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.gates = torch.nn.Linear(8, 24), torch.nn.Linear(8, 4)

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            i, f = self.gates(x).transpose(1, 2).chunk(2, 1)
            return mlstm_chunkwise(q, k, v, i, f + 3, chunk_size=16, backend="interpret").transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(1, 19, 8)
    compiled = via_compile(backend="aot_eager")(layer)
    for autocast in (False, True):
        results = []
        for function in (layer, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                h = function(x)
            results.append([h, *torch.autograd.grad(h.float().square().sum(), layer.parameters())])
        assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"
)  # array_api_compat's
def test_compile_packed():
    case = small(layout="bthd", N=2)

    def function(**arrays):
        offsets = cu_seqlens_from_document_ids(torch.tensor([0] * 7 + [1] * 12), 2)
        table = make_chunk_table(offsets, 19, 16, backend="interpret")
        options = case.options | {"cu_seqlens": offsets, "chunk_table": table, "backend": "interpret"}
        return mlstm_chunkwise(**arrays, **options)

    arrays = {name: to_torch(x) for name, x in case.arrays.items()}
    cotangents = {name: to_torch(x) for name, x in case.cotangents.items()}
    compiled = via_compile(backend="aot_eager")(function)
    same_bits(torch_results(compiled, arrays, cotangents), torch_results(function, arrays, cotangents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_a_step(dtype):
    case = make_case(T=1, K=4, V=4)
    tensors = [to_torch(x) for x in case.arrays.values()]
    step = [*(x.squeeze(2) for x in tensors[:5]), tensors[5].to(dtype), *tensors[6:]]
    function = functools.partial(mlstm_step, backend="interpret")
    compiled = via_compile(backend="aot_eager")(function)
    with torch.no_grad():
        h, states = function(*step)
        again, out = compiled(*step, out_states=tuple(step[5:]))
    assert out[0] is step[5]
    assert all(map(torch.equal, (h, *states), (again, *out)))


def test_compiled_errors_name_the_argument():
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="chunk_size: expected a power of two from 16 to 512, got 17"
    ):
        run("torch", small(chunk_size=17), "interpret", via_compile(backend="eager"))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"k: expected shape \(B, H, T, K\)"):
        case = small()
        run("torch", case.replacing(k=case.arrays["k"][..., :3]), "interpret", via_compile(backend="eager"))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, i, f):
            return mlstm_chunkwise(q, k, v, i, f, chunk_size=16, backend="interpret", return_last_states=True)

    def tensors(T):
        return tuple(to_torch(x) for x in small(T=T, states=False).arrays.values())

    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(Module(), tensors(19), dynamic_shapes=({2: length},) * 5)
    expected, got = Module()(*tensors(40)), program.module()(*tensors(40))
    assert all(map(torch.equal, (expected[0], *expected[1]), (got[0], *got[1])))


def flat(*arrays):
    h, states = mlstm_chunkwise(*arrays, chunk_size=16, backend="interpret", return_last_states=True)
    return h, *states


def loss(*arrays):
    h, c, n, m = flat(*arrays)
    return h.sin().sum() + c.square().sum() + n.sum() + m.sin().sum()


ALL = tuple(range(8))
gradient = torch.func.grad(loss, argnums=ALL)


@pytest.fixture
def arrays():
    return [to_torch(x) for x in small().arrays.values()]


@pytest.fixture
def many(arrays):
    """Three different calls, stacked."""
    return [torch.stack([x, x.flip(-1), x / 2]) for x in arrays]


def each(function, many):
    """The results of every call by itself, stacked."""
    return [torch.stack(x) for x in zip(*(function(*(x[n] for x in many)) for n in range(3)), strict=True)]


def test_func_grad(arrays):
    leaves = [x.clone().requires_grad_() for x in arrays]
    assert all(map(torch.equal, gradient(*arrays), torch.autograd.grad(loss(*leaves), leaves)))


def test_vmap(many):
    assert all(map(torch.equal, torch.func.vmap(flat)(*many), each(flat, many)))


def test_vmap_over_any_axis(many):
    axes = (2, 0, 1, 2, None, 1, 0, 1)
    moved = [x[0] if axis is None else x.movedim(0, axis) for x, axis in zip(many, axes, strict=True)]
    many[4] = torch.stack([many[4][0]] * 3)
    got = torch.func.vmap(flat, in_dims=axes, out_dims=1)(*moved)
    assert all(map(torch.equal, got, (x.movedim(0, 1) for x in each(flat, many))))


def test_vmap_runs_once(many, monkeypatch):
    batches = []
    executed = library.run
    monkeypatch.setattr(library, "run", lambda p, *rest: batches.append(p.spec("h").shape[0]) or executed(p, *rest))
    nested = [torch.stack([x, 2 * x]) for x in many]
    torch.func.vmap(torch.func.vmap(flat))(*nested)
    assert batches == [6]


def test_vmap_of_grad_and_grad_of_vmap(many):
    expected = each(gradient, many)
    assert all(map(torch.equal, torch.func.vmap(gradient)(*many), expected))
    total = torch.func.grad(lambda *x: torch.func.vmap(loss)(*x).sum(), argnums=ALL)
    assert all(map(torch.equal, total(*many), expected))


def test_vmap_of_packed_sequences(arrays):
    offsets = torch.tensor([0, 8, 19])
    tokens = [x.swapaxes(1, 2).contiguous() for x in arrays[:5]]
    function = functools.partial(mlstm_chunkwise, layout="bthd", cu_seqlens=offsets, chunk_size=16, backend="interpret")
    got = torch.func.vmap(function)(*(torch.stack([x, 2 * x]) for x in tokens))
    assert torch.equal(got, torch.stack([function(*tokens), function(*(2 * x for x in tokens))]))


@pytest.mark.parametrize("B", [1, 2])
def test_jacrev(B):
    """What is saved is not batched where the cotangents are."""
    tensors = [to_torch(x) for x in make_case(B=B, H=1, T=5, K=3, V=2, states=False).arrays.values()]
    found = []
    for backend in ("interpret", "reference"):
        function = functools.partial(mlstm_chunkwise, chunk_size=16, backend=backend)
        found.append(torch.func.jacrev(lambda q, f=function: f(q, *tensors[1:]))(tensors[0]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_no_way_drops_a_tangent(arrays):
    """Also where no gradient is recorded, and in one step."""
    text = "expected reverse mode, got forward-mode differentiation"
    fwd = torch.autograd.forward_ad
    arrays = [x.detach() for x in arrays]
    token = [x[:, :, 0] for x in arrays[:5]]
    with pytest.raises(NotImplementedError, match=text):
        torch.func.linearize(lambda q: flat(q, *arrays[1:])[0], arrays[0])
    with fwd.dual_level():
        q, dual = fwd.make_dual(arrays[0], arrays[0]), fwd.make_dual(token[0], token[0])
        with FlopCounterMode(display=False), pytest.raises(NotImplementedError, match=text):
            flat(q, *arrays[1:])
        with pytest.raises(NotImplementedError, match=text):
            frontend_torch.mlstm_step(dual, *token[1:], *arrays[5:], backend="interpret")


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_neither_forward_mode_nor_second_derivatives(arrays):
    text = "mlstm_chunkwise: expected reverse mode, got forward-mode differentiation; use backend='reference'"
    with pytest.raises(NotImplementedError, match=text):
        torch.func.jvp(lambda q: flat(q, *arrays[1:])[0], (arrays[0],), (arrays[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=text):
        flat(torch.autograd.forward_ad.make_dual(arrays[0], arrays[0]), *arrays[1:])
    text = "mlstm_chunkwise: expected a first derivative, got a call to differentiate twice"
    with pytest.raises(RuntimeError, match=text):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, *arrays[1:]).sum())(arrays[0])
    dq = library.chunkwise_backward(
        *(torch.zeros(1, 1, 19, 4), None, None, None),
        *(x if n >= 8 or x is None else x.detach() for n, x in enumerate(call("plain")[:10])),
        *(
            x.requires_grad_(x.is_floating_point())
            for n, x in enumerate(library.chunkwise(*call("plain"), True))
            if n != 3
        ),
        *call("plain")[10:],
    )[0]
    with pytest.raises(RuntimeError, match=text):
        dq.sum().backward()


def test_selective_checkpoint(arrays):
    """A policy sees the operator, and what it saves is not computed again."""

    def policy(context, operator, *_, **__):
        saved = operator is torch.ops.mlstm_dual.chunkwise.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    executed, runs = library.run, []
    leaves = [x.clone().requires_grad_() for x in arrays]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "run", lambda p, *rest: runs.append(p) or executed(p, *rest))
        context = functools.partial(create_selective_checkpoint_contexts, policy)
        checkpoint(loss, *leaves, use_reentrant=False, context_fn=context).backward()
    assert len(runs) == 1
    assert all(map(torch.equal, (x.grad for x in leaves), gradient(*arrays)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", [mlstm_chunkwise, mlstm_recurrent])
def test_autocast(operator, dtype, arrays):
    """q, k and v are cast, gates and states are not; gradients arrive in the inputs' dtypes."""
    leaves = [x.requires_grad_() for x in arrays]
    function = functools.partial(operator, backend="interpret", return_last_states=True)
    cast = [x.to(dtype) if n < 3 else x for n, x in enumerate(arrays)]
    with torch.autocast("cpu", dtype):
        got = named(function(*leaves))
        registered = library.chunkwise(*leaves, None, None, *OPTIONS.values(), True)
    expected = named(function(*cast))
    assert all(torch.equal(got[x], expected[x]) for x in got)
    assert got["h"].dtype == registered[0].dtype == dtype
    assert torch.equal(registered[0], flat(*cast)[0])
    got, expected = (torch.autograd.grad(x["h"].float().sum(), leaves) for x in (got, expected))
    assert all(x.dtype == torch.float32 for x in got)
    assert all(map(torch.equal, got, expected))


def test_a_subclass_of_tensor(arrays):
    class Tagged(torch.Tensor):
        pass

    h = flat(*(x.as_subclass(Tagged) for x in arrays))[0]
    assert isinstance(h, Tagged)
    assert torch.equal(h.as_subclass(torch.Tensor), flat(*arrays)[0])


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
def test_memory_that_does_not_hold_the_values(arrays, registered):
    """Zeros that have none, as autograd makes them, and views whose sign is to be flipped: inputs and cotangents."""
    options = {"chunk_size": 16, "backend": "interpret", "return_last_states": True}
    kinds = {
        "negative": (torch._neg_view, torch.neg),
        "zero": (lambda x: torch._efficientzerotensor(x.shape), torch.zeros_like),
    }

    def results(tensors, cotangents):
        leaves = [x.requires_grad_() if x.is_leaf else x for x in tensors]
        context = FlopCounterMode(display=False) if registered else contextlib.nullcontext()
        with context:
            h, states = mlstm_chunkwise(*leaves, **options)
        return [h, *states, *torch.autograd.grad([h, *states], leaves, cotangents)]

    outputs = results([x.clone() for x in arrays], [torch.ones_like(x) for x in named_outputs(arrays, options)])[:4]
    cotangents = [torch.randn_like(x) for x in outputs]
    for odd, plain in kinds.values():
        for n in range(8):
            given = [odd(x.detach()) if n == y else x.detach().clone() for y, x in enumerate(arrays)]
            known = [plain(x.detach()) if n == y else x.detach().clone() for y, x in enumerate(arrays)]
            assert all(map(torch.equal, results(given, cotangents), results(known, cotangents)))
        given, known = ([f(x) for x in cotangents] for f in (odd, plain))
        assert all(map(torch.equal, *(results([x.detach().clone() for x in arrays], x) for x in (given, known))))


def named_outputs(arrays, options):
    h, states = mlstm_chunkwise(*(x.detach() for x in arrays), **options)
    return [h, *states]


def test_a_step_on_memory_that_does_not_hold_the_values():
    case = make_case(T=1, K=4, V=4)
    step = [x.squeeze(2) if n < 5 else x for n, x in enumerate(to_torch(x) for x in case.arrays.values())]
    for n in range(8):
        odd = [torch._neg_view(x) if n == y else x for y, x in enumerate(step)]
        h, states = mlstm_step(*odd, backend="interpret")
        expected, after = mlstm_step(*(-x if n == y else x for y, x in enumerate(step)), backend="interpret")
        assert all(map(torch.equal, (h, *states), (expected, *after)))
