"""Tests of EmbeddingBag and Embedding."""
