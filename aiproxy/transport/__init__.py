"""One request to one upstream: name, connection, exchange, and whoever ends it from outside.

All that is known of requests, urllib3 and upstream sockets ends here: others see `Call`, `CallFailed`,
and the `Watcher` that ends both calls and waiting clients.
"""
