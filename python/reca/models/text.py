"""Text to token ids."""

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of the text alone: what frames it is the model's own business."""
    return tokenizer(text, add_special_tokens=False).input_ids
