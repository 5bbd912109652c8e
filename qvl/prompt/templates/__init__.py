"""The chat templates as Jinja text, for exported folders."""
