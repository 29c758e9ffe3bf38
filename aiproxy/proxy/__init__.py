"""From a request to its answer: attempts, their judgement, failover, and the stream after the commit.

Failover happens before the answer is returned, accounting after it, and no code does both.
"""
