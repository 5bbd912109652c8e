"""The engine behind an OpenAI-compatible door, and the chat page."""
