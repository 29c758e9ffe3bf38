"""The Messages API's requests and answers: what they say, how they are read, what crosses the proxy.

Pure functions and data; nothing here sends, waits or remembers.
"""
