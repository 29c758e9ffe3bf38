"""The ledger: what each exchange cost, and what each client key may still spend.

It knows neither HTTP nor upstreams. Money is counted in nano-dollars, as integers: sums are exact.
"""
