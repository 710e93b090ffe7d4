"""What a model folder has to hold; apart from what reads it, whose import takes seconds."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Any of these is a tokenizer."""
