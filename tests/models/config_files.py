"""config.json files of models by DeepSeek, with one size changed."""

import json
from pathlib import Path

LANGUAGE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
            "vocab_size", "rms_norm_eps")  # fmt: skip


def change_size(source: Path, place: str, folder: Path) -> None:
    """Write the config.json of `source` into `folder`, with another value at a place such as text_config.vocab_size."""
    config = json.loads((source / "config.json").read_text())
    *path, key = place.split(".")
    section = config
    for part in path:
        section = section[part]
    section[key] = [7] if isinstance(section[key], list) else section[key] + 1
    (folder / "config.json").write_text(json.dumps(config))
