"""Which upstream is asked next, and which is left alone: weights, circuits, affinity, thread owners.

Arithmetic under locks, with the clock passed in. Only `redis_state` does I/O, in a thread of its own
wherever a request does not have to wait for it.
"""
