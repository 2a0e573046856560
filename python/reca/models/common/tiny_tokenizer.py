"""A word-level tokenizer for tiny random models, built without downloads."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

UNKNOWN = "<unk>"
TOKEN = r"\w+|[^\w\s]|\n"  # a word, a punctuation mark, a line break


def word_tokenizer(words: Iterable[str], special_tokens: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with ids in this order: <unk>, the distinct words, then the distinct special tokens.

    Words, punctuation marks and newlines are tokens. It is case-sensitive. Anything not in `words` becomes <unk>.
    """
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([UNKNOWN, *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=UNKNOWN, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer
