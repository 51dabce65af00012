"""Evaluation: zero-shot retrieval, masked-language accuracy and the report."""
