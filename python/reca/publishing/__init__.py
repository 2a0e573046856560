"""An export for others: `reca export --card` and `--push`.

card.py    the model card README.md and its pictures
card.md    its text
push.py    the upload to the Hugging Face hub
"""
