"""The demo model: its corpus, its tokenizer, its training recipe, its examination and its checkpoint."""
