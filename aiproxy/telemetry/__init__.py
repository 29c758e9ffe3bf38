"""What is told of the service while it runs: log lines, figures for Prometheus, the last hour.

Knows no upstream, no request and no HTTP.
"""
