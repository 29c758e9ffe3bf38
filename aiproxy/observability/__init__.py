"""What is reported of the service while it runs: log lines, figures for Prometheus, the last hour.

Told by others what happened; nothing here decides anything.
"""
