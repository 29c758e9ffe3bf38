"""One request to one upstream: name, connection, exchange, and whoever ends it from outside.

All that is known of requests, urllib3 and sockets ends here: callers see `Call` and `CallFailed`.
"""
