"""Tokenizer, incremental detokenisation and chat templates, without torch."""
