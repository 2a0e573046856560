"""Published weights and datasets of the Hugging Face hub."""
