"""An export for others: `reca export --card` and `--push`.

card.py    the model card README.md and its images
card.md    its text
push.py    the upload to the Hugging Face hub
"""
