"""Small tokenizers of every kind, trained on a few sentences, with markers of a chat template as special tokens."""

import json

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CORPUS = ["It is a cat in GPT-2.", "Name the colour of the sky, please!", "user and assistant say < s > and | x |"] * 5


def byte_level(begins: bool = False, ignore_merges: bool = False, strips: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2; with `ignore_merges` as Llama 3, with `strips` as Phi-3, whose markers take white space along."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, lstrip=strips, rstrip=strips, normalized=False) for text in SPECIAL])
    return _wrap(tokenizer, begins)


def sentencepiece_bpe(legacy: bool = False, normalized: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2: special tokens inside the vocabulary, and a blank before the first word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [*SPECIAL[:3], *byte_tokens]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    added = [{**token, "normalized": normalized} for token in state["added_tokens"]]
    state["added_tokens"] = [token for token in added if token["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL[3:]])
    return _wrap(tokenizer, begins=True)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT, in lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, begins=True)


def word_level() -> PreTrainedTokenizerFast:
    """Words between blanks: `</s>` is a word of the vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return _wrap(tokenizer, begins=True)


def unigram() -> PreTrainedTokenizerFast:
    """As T5, which also ends each text: `</s>` is a piece of the vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return _wrap(tokenizer, begins=False)


def _wrap(tokenizer: Tokenizer, begins: bool) -> PreTrainedTokenizerFast:
    if begins:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


KINDS = {
    "byte level": byte_level,
    "Llama 3": lambda: byte_level(begins=True, ignore_merges=True),
    "Phi 3": lambda: byte_level(begins=True, strips=True),
    "Llama 2": sentencepiece_bpe,
    "Llama 2, legacy": lambda: sentencepiece_bpe(legacy=True),
    "Llama 2, normalized": lambda: sentencepiece_bpe(legacy=True, normalized=True),
    "WordPiece": word_piece,
}
