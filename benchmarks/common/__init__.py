"""One stopwatch, one measurement of ceilings, one form of record and report, for all benchmarks and studies.

`timing` and `records` import neither JAX nor torch: the peers in torch use them too.
"""
