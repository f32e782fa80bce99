"""Chat models and GPT-2: architecture, weights, adapters, tokenizer."""
