"""Exact nearest neighbors of the rows of an embedding table: the search, the same over several ranks, and a table that
is kept up to date. Nothing is re-exported here: import from `api` and `table`."""
