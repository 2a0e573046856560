"""Publishing of an export: `reca export --card` and `--push`.

card.py    the model card README.md and its images
card.md    its template
push.py    upload to the Hugging Face hub
"""
