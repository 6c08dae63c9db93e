"""Text to token ids and back, all through Hugging Face `tokenizers`."""
