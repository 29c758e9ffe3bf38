"""aiproxy: a self-hosted proxy for the Anthropic Messages API."""

__version__ = "1.0.0"
