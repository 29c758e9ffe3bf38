"""Requests to upstreams: the shared session, its connections, and waiting for them.

All that is known of requests, urllib3 and upstream sockets ends here. Others see `session.Transport`, its
`UpstreamResponse`, `failures.TransportError` and the `Wait` of their own thread.
"""
