"""The story a newcomer runs, one file a chapter."""
