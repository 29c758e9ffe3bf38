"""aiproxy: a self-hosted proxy for the Anthropic Messages API."""
