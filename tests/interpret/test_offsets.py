"""Elements beyond 2**31 from the first: strided views of a sparse file, of which few pages exist."""

import numpy as np
import pytest
import torch

from frontend_torch import mlstm_chunkwise

FAR = 2**30 + 2**29 + 16  # three of these, or two with what lies between, pass 2**31 and 2**32
TOKENS = {"q": 16, "k": 16, "v": 16, "i": 1, "f": 1}


def spread(path, axis, name, D, near):
    """(2, 2, 3, D) with an axis so long that it needs 64 bits; the values of `near`."""
    strides = [2 * 3 * D, 3 * D, D]
    strides[axis] = FAR
    memory = np.memmap(path / name, np.float16, "w+", shape=(2 * FAR + 2**20,))
    view = torch.from_numpy(memory).as_strided(near.shape, (*strides, 1)[: near.dim()])
    view.copy_(near)
    return view


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "token"])
def test_far_elements(tmp_path, axis):
    generator = torch.Generator().manual_seed(0)
    near = {n: torch.randn((2, 2, 3, D)[: 4 if D > 1 else 3], generator=generator).half() for n, D in TOKENS.items()}
    dh = torch.randn(near["v"].shape, generator=generator).half()
    far = {name: spread(tmp_path, axis, name, TOKENS[name], x) for name, x in near.items()}
    far_dh = spread(tmp_path, axis, "dh", 16, dh)
    results = []
    for inputs, cotangent in ((near, dh), (far, far_dh)):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        h = mlstm_chunkwise(*leaves, chunk_size=16, backend="interpret")
        results.append([h, *torch.autograd.grad(h, leaves, cotangent)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
