"""Shared code of the models: chat prompts, decoding, images, text, codecs, weight files, exports, argument checks."""
