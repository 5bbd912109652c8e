"""The whole Qwen3-VL system in one readable package; model/qwen3vl.py is the place to start reading."""

__version__ = "0.1.0"
