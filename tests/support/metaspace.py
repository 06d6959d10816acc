"""A tokenizer as T5's: words with a leading ▁, single letters, `</s>` behind every text, and a decoder that gives the
first word of a text without its space."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PAD, EOS, UNKNOWN, EXTRA = range(4)
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
WORDS = ("▁", "▁Hello", "▁world", "▁▁x", "ing", "▁日", "本", ".", *"abcdefghijklmnopqrstuvwxyz")


def metaspace_tokenizer() -> Tokenizer:
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS] + [(token, -1.0 - len(token) % 3) for token in WORDS]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def metaspace_tokenizer_json() -> bytes:
    return metaspace_tokenizer().to_str().encode()


def word_id(token: str) -> int:
    """The id of one of WORDS."""
    return len(SPECIAL_TOKENS) + WORDS.index(token)
