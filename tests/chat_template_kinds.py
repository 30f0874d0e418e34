"""Chat templates as families of models write their turns, in our own words, and small tokenizers with their markers.

Each differs from the others in what matters here: where a system message goes, which orders of roles are refused, what
is trimmed, what stands in front of all, what is left out of the history, and what ends a turn.
"""

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "You are brief and kind. Name a colour of the sky, please!",
    "system user assistant model think < | > [ ]",
] * 5
CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN_2_5 = """\
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role != 'system' or not loop.first %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN_3 = """\
{%- set found = namespace(question=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set found.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, answer = '', m.content %}
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > found.question and (loop.last or thought) %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- answer + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
PHI_3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
GEMMA = """\
{{- bos_token }}
{%- set start = 1 if messages[0].role == 'system' else 0 %}
{%- set before = messages[0].content + '\n\n' if start else '' %}
{%- for m in messages[start:] %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (before if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- set start = 1 if messages[0].role == 'system' else 0 %}
{%- for m in messages[start:] %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (messages[0].content + '\n\n' if start and loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


class Family(NamedTuple):
    """A template, its special tokens, its end of text and of turn, and whether its tokenizer begins with <s>."""

    template: str
    special: tuple[str, ...]
    end_of_text: str
    end_of_turn: str
    begins: bool = False
    appends: bool = True  # whether each turn's prompt begins with all that was said before it

    def tokenizer(self) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(CORPUS, trainer)
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", *self.special)])
        backend.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
        if self.begins:
            begin = ("<s>", backend.token_to_id("<s>"))
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token=self.end_of_text, model_max_length=512
        )
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "ChatML": Family(CHATML, IM, "<|im_end|>", "<|im_end|>"),
    "Qwen 2.5": Family(QWEN_2_5, IM, "<|endoftext|>", "<|im_end|>"),
    "Qwen 3": Family(QWEN_3, IM, "<|im_end|>", "<|im_end|>", appends=False),
    "Llama 3": Family(
        LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"), "<|end_of_text|>",
        "<|eot_id|>", begins=True,
    ),
    "Phi 3": Family(
        PHI_3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), "<|endoftext|>", "<|end|>"
    ),
    "Gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>", "<eos>"), "<eos>", "<end_of_turn>", begins=True),
    "Mistral": Family(MISTRAL, ("[INST]", "[/INST]", "</s>"), "</s>", "</s>", begins=True, appends=False),
    "Zephyr": Family(ZEPHYR, ("<|system|>", "<|user|>", "<|assistant|>", "</s>"), "</s>", "</s>"),
}  # fmt: skip
