"""Attention over a tree of runs, in both ways, against attention by definition: outputs and gradients."""

import collections
import itertools
import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from recipe import attention, attention_products
from recipe.attention_flash import FLASH, Kernel, MergedAttention
from recipe.attention_products import ProductAttention

LAYERS = ["full_attention", "sliding_attention"]

SEGMENTS = {
    "a preamble": ((0, 8), (5, 1), (5, 7)),
    "several roots": ((0, 8), (5, 4), (0, 8), (2, 1), (2, 1), (0, 2)),
    "nothing in common": ((0, 4), (0, 2), (0, 9)),
    "one example": ((0, 9),),
    "deep": ((0, 12), (9, 4), (11, 2), (9, 1), (3, 20), (13, 5), (14, 2), (3, 1)),
    "a chain of branches": ((0, 30), (25, 3), (20, 3), (12, 6), (5, 2)),
    "longer than a piece": ((0, 40), (33, 21), (10, 35), (44, 2)),
    "one token each": ((0, 1), (0, 1)),
}
HEADS = {"gpt2": (4, 4, 16), "grouped queries": (6, 2, 8)}  # of queries, of keys, size


def visible(segments) -> torch.Tensor:
    """Which tokens each token sees, (time, time), example by example."""
    time, example, start = sum(length for _, length in segments), [], 0
    seen = torch.zeros(time, time, dtype=torch.bool)
    for shared, length in segments:
        example = example[:shared] + list(range(start, start + length))
        for place in range(shared, len(example)):
            seen[example[place], example[: place + 1]] = True
        start += length
    return seen


def by_definition(query, key, value, segments, scale) -> torch.Tensor:
    key, value = (each.repeat_interleave(len(query) // len(key), dim=0) for each in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~visible(segments).to(query.device), float("-inf"))
    return scores.softmax(-1) @ value


def sequences(query, key, value, query_starts, key_starts, most_queries, most_keys, causal, scale):
    """Of a packed call, one after another: slices of queries and keys; states by head; and the scores."""
    assert query_starts.dtype == key_starts.dtype == torch.int32 and len(query_starts) == len(key_starts)
    assert (query_starts[-1], key_starts[-1]) == (len(query), len(key)) and query_starts[0] == key_starts[0] == 0
    assert (most_queries, most_keys) == (query_starts.diff().max(), key_starts.diff().max())
    repeats = query.shape[1] // key.shape[1]
    for bounds in zip(*(pair for each in (query_starts, key_starts) for pair in (each[:-1], each[1:])), strict=True):
        queries, keys = slice(*bounds[:2]), slice(*bounds[2:])
        asking, seen, values = query[queries].transpose(0, 1), *(
            each[keys].transpose(0, 1).repeat_interleave(repeats, dim=0) for each in (key, value)
        )  # fmt: skip
        scores = asking @ seen.mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        yield queries, keys, asking, seen, values, scores


def packed_forward(query, key, value, *arguments, scale):
    """`torch.ops.aten._flash_attention_forward` by definition."""
    *starts, dropout, causal, debug = arguments
    assert dropout == 0 and debug is False
    found = [
        ((scores.softmax(-1) @ values).transpose(0, 1), scores.logsumexp(-1))
        for *_, values, scores in sequences(query, key, value, *starts, causal, scale)
    ]
    outputs, sums = zip(*found, strict=True)
    return torch.cat(outputs), torch.cat(sums, dim=1), None, None, None


def packed_backward(gradient, query, key, value, output, lse, *arguments, scale):
    """`torch.ops.aten._flash_attention_backward` by definition: weights from the log-sum-exps that it is given."""
    *starts, dropout, causal, _, _ = arguments
    assert dropout == 0 and gradient.is_contiguous() and output.is_contiguous()
    results = [torch.zeros_like(each) for each in (query, key, value)]
    for queries, keys, asking, seen, values, scores in sequences(query, key, value, *starts, causal, scale):
        weights = (scores - lse[:, queries, None]).exp()
        given, merged = gradient[queries].transpose(0, 1), output[queries].transpose(0, 1)
        of_scores = weights * (given @ values.mT - (given * merged).sum(-1, keepdim=True)) * scale
        results[0][queries] = (of_scores @ seen).transpose(0, 1)
        for result, repeated in ((results[1], of_scores.mT @ asking), (results[2], weights.mT @ given)):
            result[keys] = repeated.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
    return results


def by_products(query, key, value, segments, scale, dropout=0.0):
    return ProductAttention.apply(query, key, value, segments, scale, dropout)


def by_merging(query, key, value, segments, scale):
    return MergedAttention.apply(query, key, value, segments, scale, Kernel(packed_forward, packed_backward))


WAYS = {"products": by_products, "merged": by_merging}


def random_states(segments, heads, device="cpu", dtype=torch.float64):
    """query, key, value (1, heads, time, head size), which require gradients, and a gradient of the output."""
    queries, keys, size = heads
    time = sum(length for _, length in segments)
    torch.manual_seed(0)
    states = [torch.randn(1, each, time, size) for each in (queries, keys, keys)]
    return [each.to(device, dtype).requires_grad_() for each in states], torch.randn(1, time, queries, size).to(device)


SIZES = {  # of bundles
    "small": {"BUNDLE_COST": 0, "MOST_PAIRS": 8, "LONGEST": 7, "MOST_COPIES": 0, "KEPT": 0},
    "large": {"BUNDLE_COST": 2**20, "MOST_PAIRS": 2**20, "MOST_COPIES": 2**20, "KEPT": 2**20},
    "as they are": {},
}


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setattr(attention_products, name, value)
    attention_products._plan.cache_clear()
    yield
    attention_products._plan.cache_clear()


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_each_way_is_attention_by_definition(segments, heads, way):
    states, gradient = random_states(segments, heads)
    gradient = gradient[0].transpose(0, 1).double()
    expected = by_definition(*(each[0] for each in states), segments, 0.3)
    output = way(*(each[0] for each in states), segments, 0.3)
    results = [output, *torch.autograd.grad(output, states, gradient)]
    torch.testing.assert_close(results, [expected, *torch.autograd.grad(expected, states, gradient)])


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_values_may_be_of_another_size_than_keys(segments):
    """As in DeepSeek's latent attention."""
    states, gradient = random_states(segments, (4, 4, 12))
    states[2] = states[2].detach()[..., :8].requires_grad_()
    expected = by_definition(*(each[0] for each in states), segments, 12**-0.5).transpose(0, 1)[None]
    output, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=segments)
    found, wanted = (torch.autograd.grad(each, states, gradient[..., :8].double()) for each in (output, expected))
    torch.testing.assert_close([output, *found], [expected, *wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_the_registered_attention_is_attention_by_definition(segments, dtype):
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for heads in HEADS.values():
        states, gradient = random_states(segments, heads, dtype=dtype)
        output, weights = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=segments)
        assert output.dtype == dtype and output.is_contiguous() and weights is None
        results = [output, *torch.autograd.grad(output, states, gradient.to(dtype))]
        exact = [each.detach().double().requires_grad_() for each in states]
        expected = by_definition(*(each[0] for each in exact), segments, heads[2] ** -0.5).transpose(0, 1)[None]
        references = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
        for result, reference in zip(results, references, strict=True):
            # where a query sees one key alone, its gradient is zero but for rounding
            assert (result.double() - reference).norm() <= tolerance * max(reference.norm(), gradient.norm()), heads


@pytest.mark.parametrize("size", [1, 1000])
def test_scores_of_any_size_stay_finite(size):
    """In one run the first key is far from the second's query, in the other what stands above is."""
    segments = ((0, 3), (2, 2))
    states, gradient = random_states(segments, HEADS["gpt2"], dtype=torch.float32)
    query, key, value = (each[0].detach() * size for each in states)
    query, key, value = query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    for way in WAYS.values():
        output = way(query, key, value, segments, 1.0)
        gradients = torch.autograd.grad(output, (query, key, value), gradient[0].transpose(0, 1))
        expected = by_definition(query, key, value, segments, 1.0)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * size)
        assert all(each.isfinite().all() for each in gradients)


@pytest.mark.usefixtures("sizes")
def test_dropped_weights_are_the_same_in_both_passes():
    """With the weights dropped that the forward pass dropped, the gradient is that of finite differences."""
    segments = SEGMENTS["deep"]
    states, _ = random_states(segments, HEADS["grouped queries"])
    rows = [each[0].detach().requires_grad_() for each in states]

    def attend(*states):
        torch.manual_seed(5)
        return by_products(*states, segments, 0.3, 0.5)

    assert torch.autograd.gradcheck(attend, rows, fast_mode=True)
    assert not torch.equal(attend(*rows), by_products(*rows, segments, 0.3, 0.5))
    kept = by_definition(*rows, segments, 0.3)
    torch.manual_seed(0)
    mean = sum(by_products(*rows, segments, 0.3, 0.5) for _ in range(400)) / 400
    assert (mean - kept).norm() < 0.1 * kept.norm()


def test_gradients_of_what_is_shared_are_summed_in_float32():
    """513 examples give a shared value gradients of which bfloat16 would lose most: 256 + 1 rounds to 256."""
    segments = ((0, 2), *((1, 1) for _ in range(512)))
    states, _ = random_states(segments, (1, 1, 8), dtype=torch.bfloat16)
    query, key, value = (each[0].detach().zero_().requires_grad_() for each in states)
    for way in WAYS.values():
        output = way(query, key, value, segments, 1.0)
        gradient = torch.autograd.grad(output, value, torch.full_like(output, 2.0))[0]
        # each of 513 examples gives its half to the shared value, which also keeps all of its own
        assert gradient[0, 0, 0].item() == pytest.approx(2 + 513, rel=0.01)


@pytest.mark.parametrize("above", [0, 30])
def test_runs_are_bundled_without_much_padding(above):
    assert attention_products.bundle_sizes([(410, 0), (400, 0), (14, 0), (12, 3), (10, 0)], above=0) == [1, 1, 3]
    draw = random.Random(0)
    shapes = sorted(((draw.randrange(1, 256), draw.choice((0, 0, 5))) for _ in range(500)), reverse=True)
    sizes = attention_products.bundle_sizes(shapes, above)
    assert sum(sizes) == len(shapes) and max(sizes) > 5
    for start, end in itertools.pairwise([0, *itertools.accumulate(sizes)]):
        members = shapes[start:end]
        pairs = len(members) * members[0][0] * (above + max(copied for _, copied in members) + members[0][0])
        assert len(members) == 1 or pairs <= attention_products.MOST_PAIRS
        needed = sum(length * (above + copied + length) for length, copied in members)
        assert pairs - needed <= attention_products.BUNDLE_COST


@pytest.mark.parametrize(("members", "copies"), [(2, {0, 3}), (99, {0})])
def test_few_runs_below_a_few_tokens_more_go_with_others_and_many_do_not(members, copies):
    """Some branches share three tokens with one another that the other twelve do not."""
    segments = ((0, 60), *((33, 21) for _ in range(members)), *((30, 20) for _ in range(12)))
    bundles = attention_products._plan(segments, torch.device("cpu"), torch.float32).bundles
    assert {bundle.missing.shape[1] for bundle in bundles} == copies
    runs = collections.Counter()
    for bundle in bundles:
        runs[bundle.above] += bundle.runs
    assert runs == ({(): 1, ((0, 30),): 14} if members == 2 else {(): 1, ((0, 30),): 12, ((0, 33),): 99})


def test_rotary_embeddings_in_float32_under_autocast():
    """Autocast leaves query and key of rotary models in float32; SDPA casts them, and so does this."""
    segments = SEGMENTS["several roots"]
    (query, key, value), _ = random_states(segments, HEADS["grouped queries"], dtype=torch.float32)
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
def test_on_a_gpu_equals_the_definition_and_repeats(dtype):
    """In bfloat16 by FlashAttention, in float32 by matrix products; against float64 of the same numbers."""
    flash = torch.cuda.get_device_capability() >= (8, 0) and dtype == torch.bfloat16
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3  # TF32 where it is on
    shapes = [*SEGMENTS.values(), ((0, 54), *((24, 30) for _ in range(31)), (0, 500), (300, 200))]
    for segments, heads in itertools.product(shapes, [(12, 12, 64), (8, 2, 128)]):
        states, gradient = random_states(segments, heads, "cuda", dtype)
        assert attention._flash_runs(*states) == flash
        output, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=segments)
        results = [output, *torch.autograd.grad(output, states, gradient.to(dtype))]
        exact = [each.detach().double().requires_grad_() for each in states]
        expected = by_definition(*(each[0] for each in exact), segments, heads[2] ** -0.5).transpose(0, 1)[None]
        references = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
        for result, reference in zip(results, references, strict=True):
            assert (result.double() - reference).norm() <= tolerance * reference.norm(), (segments, heads)
        again, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=segments)
        keys = torch.autograd.grad(again, states[1:], gradient.to(dtype))
        assert all(torch.equal(*pair) for pair in zip(keys, results[2:], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_nothing_waits_for_the_device(dtype):
    """Indices come from pinned memory; `set_sync_debug_mode` raises where the host waits."""
    states, gradient = random_states(SEGMENTS["deep"], (12, 12, 64), "cuda", dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = attention.shared_prefix_attention(torch.nn.Module(), *states, None, segments=SEGMENTS["deep"])
        output.backward(gradient.to(dtype))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isfinite().all() and all(state.grad.isfinite().all() for state in states)


def test_flash_attention_has_the_arguments_that_are_given():
    """On a CPU the call is refused for its device alone, after its arguments were matched."""
    segments = SEGMENTS["deep"]
    states, _ = random_states(segments, (2, 2, 8), dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        MergedAttention.apply(*(each[0] for each in states), segments, 1.0, FLASH)
    output = MergedAttention.apply(*(each[0] for each in states), segments, 1.0, Kernel(packed_forward, FLASH.backward))
    with pytest.raises(NotImplementedError, match="_flash_attention_backward"):
        output.sum().backward()


def test_the_definition_equals_sdpa_on_one_sequence():
    (query, key, value), _ = random_states(((0, 9),), HEADS["gpt2"])
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    torch.testing.assert_close(by_definition(query[0], key[0], value[0], ((0, 9),), 0.25), expected[0])


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
