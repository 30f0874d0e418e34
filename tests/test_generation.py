"""Batched generation against one prompt at a time, and against plain argmax without a cache."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import DEMO, ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicLayer

import recipe.attention  # registers "shared_prefix"
from recipe.config import UserError
from recipe.evaluation.likelihood import reference_losses
from recipe.generation import CACHE_BLOCK, STEPS, BlockwiseLayer, Decoding, generate_responses, iter_responses
from recipe.templates import load_template

PROMPTS = load_template("alpaca").prompts(
    [
        {"instruction": "Write the plural of the word.", "input": "cat"},
        {"instruction": "Say it in the past tense. " + "Anna walks to the park and reads a book. " * 3, "input": ""},
        {"instruction": "Name a colour.", "input": ""},
        {"instruction": "Count the words.", "input": "The river is long and the road is short."},
    ]
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "base")


@torch.no_grad()
def argmax_without_cache(model, tokenizer, prompt: str, count: int) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < count:
        token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return new


def test_batched_equals_one_by_one_equals_argmax(demo_model, tokenizer):
    batched = generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    single = generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=1)
    assert batched == single
    demo_model.eval()
    for prompt, response in zip(PROMPTS, batched, strict=True):
        expected = argmax_without_cache(demo_model, tokenizer, prompt, 12)
        assert response.token_ids == expected
        assert response.text == tokenizer.decode(expected)
        assert response.stop_reason == ("eos" if len(expected) < 12 else "length")


def test_model_and_tokenizer_are_left_as_they_were(demo_model, tokenizer):
    demo_model.train()
    demo_model.generation_config.do_sample = True
    demo_model.generation_config.repetition_penalty = 5.0
    demo_model.generation_config.no_repeat_ngram_size = 1
    saved = demo_model.generation_config
    responses = generate_responses(demo_model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    assert responses[0].token_ids == argmax_without_cache(demo_model.eval(), tokenizer, PROMPTS[0], 8)
    assert demo_model.generation_config is saved
    assert tokenizer.padding_side == "right" and tokenizer.pad_token is None
    demo_model.train()
    generate_responses(demo_model, tokenizer, PROMPTS[:1], max_new_tokens=1)
    assert demo_model.training


SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
POSITIONS = 160
ROTARY = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
ARCHITECTURES = {
    "gpt2": {**SIZES, "max_position_embeddings": POSITIONS},
    "llama": ROTARY,
    "qwen2": ROTARY,
    "mistral": {**ROTARY, "sliding_window": 6},
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 4},
}
SYSTEM = "You are kind. " + "The river is long and the road is short. " * 4
PROMPT_SETS = {
    "a long system prompt": [
        f"{SYSTEM}Anna walks to the {place}" for place in ("park", "old green park", "sea and back.")
    ],
    "nothing in common": ["Name a colour.", "Anna walks", "The road is short."],
    "one is what the others start with": [SYSTEM, SYSTEM + "Anna walks to the park", SYSTEM + " cat"],
    "all the same": [SYSTEM] * 3,
    "one prompt": [SYSTEM],
    "the preamble of a template": PROMPTS,
}


def random_model(architecture: str, tokenizer, attention: str | None = None):
    """Weights large enough that responses differ from prompt to prompt."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def computed_shapes(model) -> list[tuple[int, ...]]:
    """Filled with the shape of the tokens of each call that the model computes."""
    shapes: list[tuple[int, ...]] = []

    def record(module, args, kwargs):
        shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("prompts", PROMPT_SETS.values(), ids=PROMPT_SETS)
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("gpt2", "sdpa"), ("gpt2", "eager"), ("gpt2", recipe.attention.NAME), ("llama", "sdpa"), ("llama", "eager"),
     ("qwen2", "sdpa")],
)  # fmt: skip
def test_a_shared_prefix_computed_once_changes_no_token(architecture, attention, prompts, tokenizer):
    model, count = random_model(architecture, tokenizer, attention), STEPS + 4
    expected = [argmax_without_cache(model, tokenizer, prompt, count) for prompt in prompts]
    assert max(map(len, expected)) == count
    for batch_size in (1, 2, len(prompts)):
        responses = generate_responses(model, tokenizer, prompts, max_new_tokens=count, batch_size=batch_size)
        assert [response.token_ids for response in responses] == expected


def test_a_shared_prefix_is_computed_once_for_all_batches(tokenizer):
    model, prompts = random_model("gpt2", tokenizer), PROMPT_SETS["a long system prompt"]
    lengths = sorted((len(ids) for ids in tokenizer(prompts)["input_ids"]), reverse=True)
    prefix = len(tokenizer(SYSTEM + "Anna walks to the")["input_ids"])
    shapes = computed_shapes(model)
    generate_responses(model, tokenizer, prompts, max_new_tokens=1, batch_size=2)
    assert shapes == [(1, prefix), (2, lengths[0] - prefix), (1, lengths[2] - prefix)]
    shapes.clear()
    generate_responses(model, tokenizer, [SYSTEM, SYSTEM], max_new_tokens=1)
    assert shapes == [(1, len(tokenizer(SYSTEM)["input_ids"])), (2, 1)]  # one token is left, to give the next one
    shapes.clear()
    generate_responses(model, tokenizer, PROMPT_SETS["nothing in common"], max_new_tokens=1)
    generate_responses(model, tokenizer, [SYSTEM], max_new_tokens=1)
    assert len(shapes) == 2


def test_a_shared_prefix_up_to_the_end_of_the_context(tokenizer):
    """A prefix that leaves 4, 1 and no positions to prompts that share all of it."""
    for architecture in ("gpt2", "llama"):
        model, word = random_model(architecture, tokenizer), " the"
        prompts = [word * (POSITIONS - room) for room in (0, 1, 4, 40)]
        assert [len(ids) for ids in tokenizer(prompts)["input_ids"]] == [POSITIONS - room for room in (0, 1, 4, 40)]
        responses = generate_responses(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
        assert [len(response.token_ids) for response in responses] == [0, 1, 4, 6]
        assert [response.stop_reason for response in responses] == ["context", "context", "context", "length"]
        for prompt, response in zip(prompts, responses, strict=True):
            assert response.token_ids == argmax_without_cache(model, tokenizer, prompt, len(response.token_ids))


@pytest.mark.parametrize("architecture", ["mistral", "mamba"])
def test_models_that_cache_something_else_share_no_prefix(architecture, tokenizer):
    """A sliding window shorter than the prompts, and a state instead of keys and values."""
    model, prompts = random_model(architecture, tokenizer), PROMPT_SETS["a long system prompt"]
    expected = [argmax_without_cache(model, tokenizer, prompt, STEPS + 4) for prompt in prompts]
    shapes = computed_shapes(model)
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=STEPS + 4, batch_size=1)
    assert [response.token_ids for response in responses] == expected
    assert {response.stop_reason for response in responses} == {"length"}  # also where there is no limit of positions
    assert shapes[0] == (1, max(len(ids) for ids in tokenizer(prompts)["input_ids"]))


def test_rows_that_have_ended_leave_their_batch(tokenizer):
    """A model for which the end-of-text token is likely: sampled responses end at different lengths."""
    model, eos = random_model("gpt2", tokenizer), tokenizer.eos_token_id
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.1)
        model.transformer.ln_f.bias.copy_(4 * model.lm_head.weight[eos] / model.lm_head.weight[eos].square().sum())
    prompts = [f"{SYSTEM}Anna walks {number}" for number in range(24)]
    decoding = Decoding(max_new_tokens=3 * STEPS, temperature=1.0)
    expected = [next(iter_responses(model, tokenizer, [prompt], decoding))[1][0] for prompt in prompts]
    lengths = [len(response.token_ids) for response in expected]
    assert min(lengths) < STEPS < sorted(lengths)[-3] and {r.stop_reason for r in expected} >= {"eos"}
    shapes = computed_shapes(model)
    [(indices, responses)] = iter_responses(model, tokenizer, prompts, decoding, batch_size=24)
    assert [response.token_ids for response in responses] == [expected[index].token_ids for index in indices]
    assert [response.stop_reason for response in responses] == [expected[index].stop_reason for index in indices]
    unfinished = [sum(length >= done for length in lengths) for done in (0, STEPS, 2 * STEPS)]
    rows = [shape[0] for shape in shapes[1:]]  # the first is the prefix
    assert rows == [count for count in unfinished for _ in range(STEPS)][: len(rows)]
    assert rows[-1] == unfinished[-1] < 24


def test_the_cache_in_blocks_holds_what_the_usual_one_holds():
    """Over several blocks, with rows that leave, and keys of another size than values."""
    torch.manual_seed(0)
    blockwise, usual, rows = BlockwiseLayer(), DynamicLayer(), 4
    for time in (5, 1, CACHE_BLOCK - 1, 1, 1, 2 * CACHE_BLOCK, 1, 1):
        key_states, value_states = torch.randn(rows, 2, time, 8), torch.randn(rows, 2, time, 6)
        found, expected = (layer.update(key_states, value_states) for layer in (blockwise, usual))
        assert all(map(torch.equal, found, expected))
        if time > 5:
            rows -= 1
            for layer in (blockwise, usual):
                layer.batch_select_indices(torch.arange(rows))
            assert torch.equal(blockwise.keys, usual.keys) and torch.equal(blockwise.values, usual.values)
    storage = blockwise.keys.untyped_storage()
    blockwise.update(torch.randn(rows, 2, 1, 8), torch.randn(rows, 2, 1, 6))
    assert blockwise.keys.untyped_storage().data_ptr() == storage.data_ptr()  # no copy


def test_stop_reasons_and_padding_are_told_apart(demo_model, tokenizer):
    """A model made to end at once: every weight that leads to the end-of-text token wins."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[tokenizer.eos_token_id])
        model.lm_head.weight[tokenizer.eos_token_id] *= 10
    [response] = generate_responses(model, tokenizer, PROMPTS[:1], max_new_tokens=5)
    assert (response.text, response.token_ids, response.stop_reason) == ("", [], "eos")


def test_the_end_of_the_context(demo_model, tokenizer):
    """256 positions: a prompt of 254 tokens leaves two, one of 300 leaves none; short ones keep their whole room."""
    word = tokenizer(" the")["input_ids"]
    assert len(word) == 1
    prompts = ["the" + " the" * 253, "the" + " the" * 299, PROMPTS[2]]
    full, none, short = generate_responses(demo_model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert len(full.token_ids) <= 2 and full.stop_reason in ("context", "eos")
    assert (none.text, none.token_ids, none.stop_reason) == ("", [], "context")
    assert short == generate_responses(demo_model, tokenizer, [PROMPTS[2]], max_new_tokens=6)[0]


def test_no_prompts(demo_model, tokenizer):
    assert generate_responses(demo_model, tokenizer, []) == []


def test_responses_come_batch_by_batch_with_their_seconds(demo_model, tokenizer):
    batches = list(iter_responses(demo_model, tokenizer, PROMPTS, Decoding(max_new_tokens=6), batch_size=3))
    assert [len(indices) for indices, _ in batches] == [3, 1]
    assert sorted(index for indices, _ in batches for index in indices) == [0, 1, 2, 3]
    assert all(response.seconds > 0 for _, responses in batches for response in responses)


def sampled(model, tokenizer, prompts: list[str], seed: int, batch_size: int, **options) -> list[list[int]]:
    decoding = Decoding(max_new_tokens=8, temperature=1.0, seed=seed, **options)
    token_ids: dict[int, list[int]] = {}
    for indices, responses in iter_responses(model, tokenizer, prompts, decoding, batch_size):
        token_ids |= zip(indices, [response.token_ids for response in responses], strict=True)
    return [token_ids[index] for index in range(len(prompts))]


def test_sampling_depends_on_seed_and_prompt_and_not_on_the_batch(demo_model, tokenizer):
    together = sampled(demo_model, tokenizer, PROMPTS, seed=1, batch_size=4)
    assert together == sampled(demo_model, tokenizer, PROMPTS, seed=1, batch_size=1)
    assert together == sampled(demo_model, tokenizer, PROMPTS[::-1], seed=1, batch_size=2)[::-1]
    assert together != sampled(demo_model, tokenizer, PROMPTS, seed=2, batch_size=4)
    nucleus_of_one = sampled(demo_model, tokenizer, PROMPTS, seed=1, batch_size=4, top_p=1e-6)
    greedy = generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=8)
    assert nucleus_of_one == [response.token_ids for response in greedy]


def test_sampled_tokens_are_distributed_as_the_softmax(demo_model, tokenizer):
    """400 seeds against the model's own probabilities: a chi-squared statistic within five standard deviations."""
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = demo_model.eval()(ids).logits[0, -1].softmax(-1)
    drawn = 400
    counts: Counter = Counter()
    for seed in range(drawn):
        decoding = Decoding(max_new_tokens=1, temperature=1.0, seed=seed)
        [(_, [response])] = iter_responses(demo_model, tokenizer, PROMPTS[:1], decoding)
        counts[response.token_ids[0] if response.token_ids else tokenizer.eos_token_id] += 1
    likely = [token for token in probabilities.topk(50).indices.tolist() if probabilities[token] * drawn > 5]
    observed = [counts[token] for token in likely]
    expected = [probabilities[token].item() * drawn for token in likely]
    observed.append(drawn - sum(observed))
    expected.append(drawn - sum(expected))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = len(observed) - 1
    assert degrees >= 3 and statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_batch_that_does_not_fit_in_memory_is_halved(demo_model, tokenizer, monkeypatch, capsys):
    """A device of which 2 rows are all that fits, with torch's own error."""
    whole, sizes = type(demo_model).generate, []

    def generate(self, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return whole(self, input_ids=input_ids, **kwargs)

    expected = generate_responses(demo_model, tokenizer, PROMPTS * 3, max_new_tokens=4)
    monkeypatch.setattr(type(demo_model), "generate", generate)
    found = generate_responses(demo_model, tokenizer, PROMPTS * 3, max_new_tokens=4, batch_size=9)
    assert found == expected
    assert sizes == [9, 4, 2, 2, 2, 2, 1, 2, 1]
    assert "continuing with batches of 2" in capsys.readouterr().out


def test_one_prompt_that_does_not_fit_is_an_error_and_other_errors_are_raised(demo_model, tokenizer, monkeypatch):
    def out_of_memory(self, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(type(demo_model), "generate", out_of_memory)
    with pytest.raises(UserError, match=r"not even one prompt fits in memory \(\[enforce fail at alloc_cpu.cpp\]"):
        generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=4)

    def no_code_generated(self, **kwargs):
        raise RuntimeError("could not create a primitive")  # oneDNN's words where memory is short

    monkeypatch.setattr(type(demo_model), "generate", no_code_generated)
    with pytest.raises(UserError, match=r"not even one prompt fits in memory \(could not create a primitive"):
        generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=4)

    def broken(self, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(demo_model), "generate", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=4)


REAL_MEMORY = """
import resource, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
from recipe.generation import generate_responses
torch.set_num_threads(1)
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
prompts = [f"the {'the ' * 200}{i}" for i in range(512)]
few = generate_responses(model, tokenizer, prompts[:4], max_new_tokens=4, batch_size=4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, -1))
assert generate_responses(model, tokenizer, prompts, max_new_tokens=4, batch_size=512)[:4] == few
"""


def test_memory_that_really_runs_out_halves_the_batch():
    """A process that may take 300 MB more: 512 prompts at once need some 1.7 GB.

    With a fixed threshold glibc gives freed tensors back to the system, as a GPU's allocator does when asked; without,
    the limit counts them on, and nothing is left for the code that oneDNN generates.
    """
    done = subprocess.run(
        [sys.executable, "-c", REAL_MEMORY, str(DEMO / "base")], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "out of memory: continuing with batches of" in done.stdout


def with_virtual_tokens(kind: str, tokenizer):
    """A model with five virtual tokens, by PEFT, that matter."""
    peft = pytest.importorskip("peft")
    config_class = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=48, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, config_class(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=3.0)
    return model.eval()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_in_front_of_each_prompt(kind, tokenizer):
    """PEFT's prompt and prefix tuning, beside PEFT's own `generate` of each prompt alone."""
    model = with_virtual_tokens(kind, tokenizer)
    prompts = [[11, 12, 13, 14, 15, 16, 17], [11, 12, 13, 20], [11, 12, 13, 14, 30, 31]]
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, response in zip(prompts, responses, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        ours = response.token_ids
        assert ours == expected[0, -6:].tolist()[: len(ours)] and (len(ours) == 6 or response.stop_reason == "eos")
    with torch.no_grad():
        plain = model.get_base_model()(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    assert responses[0].token_ids[0] != plain  # what it would say without them
    [response] = generate_responses(model, tokenizer, [list(range(11, 51))], max_new_tokens=20)
    assert (len(response.token_ids), response.stop_reason) == (3, "context")  # 48 positions, 5 of them virtual


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_how_likely_references_are_with_virtual_tokens(kind, tokenizer):
    model = with_virtual_tokens(kind, tokenizer)
    prompts, references = [[11, 12, 13, 14], [21, 22], [11, 12, 13]], ["Blue.", "two cats", "no"]
    found = reference_losses(model, tokenizer, prompts, references)
    for prompt, reference, (nats, count) in zip(prompts, references, found, strict=True):
        targets = [*tokenizer.encode(reference, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():  # `generate`'s own forward pass for one row: the last logits are those of the row's end
            logits = model(input_ids=torch.tensor([prompt + targets])).logits[0, -len(targets) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
        assert count == len(targets) and nats == pytest.approx(expected, rel=1e-4)
