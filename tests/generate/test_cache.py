from __future__ import annotations

import pytest
import torch
from tiny_text import PROMPT, ready

from fathom.generate.cache import Cache, caches_for
from fathom.model.cost import Cost


@pytest.mark.parametrize("attention", ["gqa", "mqa", "mha", "mla", "mla_low_rank", "mla_yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_what_the_cost_formula_says(attention: str, dtype: torch.dtype) -> None:
    config = ready(attention).config
    caches = caches_for(config, config.num_hidden_layers, 3, 7, dtype, "cpu")
    assert sum(c.bytes for c in caches) == 3 * 7 * Cost(config).cache_bytes_per_token(dtype.itemsize)


def test_it_returns_everything_stored_and_goes_back() -> None:
    cache = Cache((2, 3), rows=2, capacity=5, dtype=torch.float32, device="cpu")
    a, b = torch.rand(2, 3, 2), torch.rand(2, 3, 3)
    assert [t.tolist() for t in cache.append(a, b)] == [a.tolist(), b.tolist()]
    c, d = torch.rand(2, 2, 2), torch.rand(2, 2, 3)
    both = cache.append(c, d)
    assert torch.equal(both[0], torch.cat((a, c), 1))
    assert torch.equal(both[1], torch.cat((b, d), 1))
    with pytest.raises(ValueError, match="holds 5 tokens, and 6"):
        cache.append(c[:, :1], d[:, :1])
    cache.rewind(1)
    assert cache.length == 1
    assert torch.equal(cache.append(c, d)[0], torch.cat((a[:, :1], c), 1))
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="cannot go back"):
            cache.rewind(wrong)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_rewound_cache_is_as_if_nothing_had_been(attention: str) -> None:
    model, config = ready(attention), ready(attention).config
    caches = caches_for(config, config.num_hidden_layers, 1, 9, torch.float32, "cpu")
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        model.trunk(prompt, caches=caches)
        want = model.trunk(torch.tensor([[4]]), caches=caches).hidden
        for cache in caches:
            cache.rewind(5)
        model.trunk(torch.tensor([[9, 8, 1]]), caches=caches)
        for cache in caches:
            cache.rewind(5)
        assert torch.equal(model.trunk(torch.tensor([[4]]), caches=caches).hidden, want)
