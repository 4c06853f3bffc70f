"""The speech-text model in plain PyTorch.

The code is written for a single device and imports nothing from `trainer/`.
"""
