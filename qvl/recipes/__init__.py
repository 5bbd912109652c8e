"""Runs that keep their promise: every stage, and the quickstart that tells the story on a CPU."""
