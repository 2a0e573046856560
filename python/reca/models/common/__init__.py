"""What models share: chat, greedy decoding, images, text, weight files, exports, and how inference is asked."""
