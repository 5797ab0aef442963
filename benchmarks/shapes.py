"""The shapes that are measured: vocabularies and widths of models people train."""

QWEN2_5_0_5B = (151_936, 896)
QUERIES = 2048
