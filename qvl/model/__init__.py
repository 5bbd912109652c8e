"""The network: read qwen3vl.py first, then decoder, attention, vision."""
