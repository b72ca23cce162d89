"""The platform: an OpenAI-compatible HTTP API, the job orchestrator and model serving, on a Ray cluster."""
