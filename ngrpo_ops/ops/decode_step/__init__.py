"""A decode step: `api` is the contract, `settings` its arguments, `reference` the step in plain torch.

`sampling` has the distribution and its draws, `policy` what a strategy reads, `faults` what can be wrong with a row.
"""
