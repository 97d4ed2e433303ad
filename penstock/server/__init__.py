"""The HTTP API of one engine: OpenAI's endpoints, vLLM's additions, health and metrics."""
