"""aiproxy: a self-hosted proxy for the Anthropic Messages API.

The words of this package:

upstream            a service that speaks the Messages API, with its account
client, client key  who asks, and the key that names them
exchange            one client request and everything that is done for it
attempt             one request to one upstream
fault               how an attempt failed, in one word
problem, failure    a failure as the policy sees it; the same with what came for client and log
cost, rank          what a failure costs the upstream; how well it serves as the client's answer
failover            the next attempt, after one that brought no valid answer
piece, block        bytes as they were read; the bytes of one or more whole events
commit point        from here on the client sees this attempt's answer; there is no failover any more
circuit breaker     closed, open, half-open; after `cooldown` one trial decides
trial               the one attempt that decides a half-open circuit
permit              permission to make one attempt; settled once, with success, failure or ignored
place in flight     one of the `max_in_flight` requests that are served at a time
backoff             an upstream, or one of its models, is not asked until a given time
last resort         an upstream in backoff or with an open circuit, asked because nothing else is left
drain               an upstream gets no new requests, by hand
affinity            a conversation prefers the upstream that holds its prompt cache
runtime             everything that is built from one version of the configuration
shared state        what workers and machines know in common
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 -- one line instead of a traceback
    sys.exit("aiproxy needs Python 3.11 or newer")

__version__ = "1.0.0"
