"""The one variable-length call of a GPU against attention group by group: outputs and gradients."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from recipe import attention

LAYERS = ["full_attention", "sliding_attention"]

SEGMENTS = {
    "one group": ((5, (3, 1, 7)),),
    "several groups": ((5, (3, 4)), (2, (6, 1, 1)), (1, (1,))),
    "no prefix": ((0, (4, 2)), (3, (2, 2))),
    "empty rests": ((4, (0, 3, 0)), (6, (0, 0)), (0, (5,))),
    "one example": ((0, (9,)),),
    "copies": ((6, (0, 0)),),
    "padding at the end": ((3, (2, 4)), (6, ())),
}
HEADS = {"gpt2": (4, 4, 16), "grouped queries": (6, 2, 8)}  # of queries, of keys, size


def varlen_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """`torch.nn.attention.varlen.varlen_attn`, sequence by sequence; causality is aligned at the ends."""
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and len(cu_seq_q) == len(cu_seq_k)
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max()) and cu_seq_q.diff().min() > 0
    outputs = []
    for sequence in range(len(cu_seq_q) - 1):
        queries = query[cu_seq_q[sequence] : cu_seq_q[sequence + 1]]
        keys, values = (states[cu_seq_k[sequence] : cu_seq_k[sequence + 1]] for states in (key, value))
        each = []
        for position in range(len(queries)):
            visible = len(keys) - len(queries) + position + 1
            for head in range(query.shape[1]):
                shared = head // (query.shape[1] // key.shape[1])
                scores = keys[:visible, shared] @ queries[position, head] * scale
                each.append(scores.softmax(0) @ values[:visible, shared])
        outputs.append(torch.stack(each).view(queries.shape))
    return torch.cat(outputs)


def random_states(segments, heads, device="cpu", dtype=torch.float32):
    """query, key, value (1, heads, time, head size), which require gradients, and a gradient of the output."""
    queries, keys, size = heads
    time = sum(prefix + sum(rests) for prefix, rests in segments)
    torch.manual_seed(0)
    states = [torch.randn(1, each, time, size) for each in (queries, keys, keys)]
    return [each.to(device, dtype).requires_grad_() for each in states], torch.randn(1, time, queries, size).to(device)


@pytest.fixture(params=[0, attention.BUNDLE_COST], ids=["many bundles", "few bundles"])
def bundles(request, monkeypatch):
    monkeypatch.setattr(attention, "BUNDLE_COST", request.param)
    attention._padding.cache_clear()
    yield
    attention._padding.cache_clear()


def test_bundles_are_the_cheapest_of_all():
    def cost(lengths, sizes, prefix):
        ends = [*itertools.accumulate(sizes)]
        pairs = sum(
            size * lengths[end - 1] * (prefix + lengths[end - 1]) for size, end in zip(sizes, ends, strict=True)
        )
        return pairs + attention.BUNDLE_COST * len(sizes)

    for lengths, prefix in (([1, 2, 100, 200, 210, 400], 24), ([50] * 6, 0), ([3, 300, 301, 302], 512), ([7], 5)):
        cuts = itertools.product([False, True], repeat=len(lengths) - 1)
        every = [[len([*each]) for _, each in itertools.groupby(itertools.accumulate(cut, initial=0))] for cut in cuts]
        best = min(cost(lengths, sizes, prefix) for sizes in every)
        assert cost(lengths, attention.bundle_sizes(lengths, prefix), prefix) == best
    assert attention.bundle_sizes([10, 12, 14, 400, 410], 24) == [3, 2]


@pytest.mark.usefixtures("bundles")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_one_variable_length_call_equals_group_by_group(segments, heads, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_definition)
    states, gradient = random_states(segments, heads)
    expected, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, scaling=0.3, segments=segments)
    gradients = torch.autograd.grad(expected, states, gradient)

    rows = [each[0].transpose(0, 1) for each in states]
    output = attention._attend_varlen(rows, segments, 0.3)[None]
    torch.testing.assert_close([output, *torch.autograd.grad(output, states, gradient)], [expected, *gradients])


def test_gradients_of_a_prefix_are_summed_in_float32():
    """512 ones and a 256 sum to 768; bfloat16 would stay at 256, because 256 + 1 rounds to 256."""
    rows = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    repeated = attention._Repeat.apply(rows, torch.zeros(513, dtype=torch.long))
    gradient = torch.ones_like(repeated)
    gradient[0] = 256
    assert torch.autograd.grad(repeated, rows, gradient)[0].item() == 768


def test_rotary_embeddings_in_float32_under_autocast():
    """Autocast leaves query and key of rotary models in float32; SDPA casts them, and so does this."""
    segments = SEGMENTS["several groups"]
    (query, key, value), _ = random_states(segments, HEADS["grouped queries"])
    value = value.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention.shared_prefix_attention(torch.nn.Module(), query, key, value, None, segments=segments)
    assert output.dtype == torch.bfloat16
    expected, _ = attention.shared_prefix_attention(
        torch.nn.Module(), query.bfloat16(), key.bfloat16(), value, None, segments=segments
    )
    torch.testing.assert_close(output, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_equals_the_cpu(dtype):
    """In bfloat16 by FlashAttention, in float32 group by group; against float32 of the same numbers."""
    flash = torch.cuda.get_device_capability() >= (8, 0) and dtype == torch.bfloat16
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3  # TF32 where it is on
    shapes = [*SEGMENTS.values(), ((24, (30,) * 32), (300, (0, 200)))]
    for segments, heads in itertools.product(shapes, [(12, 12, 64), (8, 2, 128)]):
        states, gradient = random_states(segments, heads, "cuda", dtype)
        assert attention._flash_runs(*states) == flash
        output, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=segments)
        results = [output, *torch.autograd.grad(output, states, gradient.to(dtype))]

        exact = [each.detach().cpu().float().requires_grad_() for each in states]
        expected, _ = attention.shared_prefix_attention(torch.nn.Module(), *exact, None, segments=segments)
        references = [expected, *torch.autograd.grad(expected, exact, gradient.cpu())]
        for result, reference in zip(results, references, strict=True):
            assert (result.cpu().float() - reference).norm() <= tolerance * reference.norm(), (segments, heads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_nothing_waits_for_the_device(dtype):
    """Indices come from pinned memory; `set_sync_debug_mode` raises where the host waits."""
    segments = ((7, (3, 4)), (5, (2, 6)))
    states, gradient = random_states(segments, (12, 12, 64), "cuda", dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=segments)
        output.backward(gradient.to(dtype))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isfinite().all() and all(state.grad.isfinite().all() for state in states)


def test_the_definition_equals_sdpa_on_one_sequence():
    (query, key, value), _ = random_states(((0, (9,)),), HEADS["gpt2"])
    starts = torch.tensor([0, 9], dtype=torch.int32)
    rows = [each[0].transpose(0, 1) for each in (query, key, value)]
    output = varlen_by_definition(*rows, starts, starts, 9, 9, scale=0.25, window_size=(-1, 0))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    torch.testing.assert_close(output, expected[0].transpose(0, 1))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, {"sliding_window": 3, "layer_types": LAYERS}])
def test_a_window_is_kept_where_there_are_no_segments(changes):
    """A whole prompt, padded and not, and generation with a cache."""
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0,
              "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    architecture = "qwen2" if "layer_types" in changes else "mistral"
    models = []
    for name in ("sdpa", attention.NAME):
        torch.manual_seed(0)
        built = AutoConfig.for_model(architecture, **config, **{"use_sliding_window": True}, **changes)
        models.append(AutoModelForCausalLM.from_config(built, attn_implementation=name).eval())
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
    for inputs in ({"input_ids": ids[1:]}, {"input_ids": ids, "attention_mask": (ids > 0).long()}):
        expected, found = (model(**inputs).logits[inputs["input_ids"] > 0] for model in models)
        assert torch.allclose(found, expected, atol=1e-6)
        expected, found = (model.generate(**inputs, max_new_tokens=8, do_sample=False) for model in models)
        assert torch.equal(found, expected)
