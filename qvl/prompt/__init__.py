"""A conversation becomes ids and patches here, and ids become a message again."""
