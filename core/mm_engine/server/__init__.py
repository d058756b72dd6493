"""The HTTP server: OpenAI's endpoints over an engine client and an input pipeline."""
