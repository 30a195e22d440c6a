"""Greedy answers of the unquantized and the quantized model to the same prompts."""
