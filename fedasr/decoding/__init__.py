"""Decoding with a language model: n-grams and a beam search over what CTC can write."""
