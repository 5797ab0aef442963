"""The operations, one file or folder each. Nothing is re-exported here: a function would shadow its module."""
