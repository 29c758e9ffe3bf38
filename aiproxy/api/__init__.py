"""The Messages API's requests and answers: what they say, how they are read, what crosses the proxy.

Nothing here sends or waits, and nothing outlasts the one request that it is about.
"""

#: Where `base_url` ends and the API begins: `base_url` is what ANTHROPIC_BASE_URL would be.
MESSAGES = "/v1/messages"
