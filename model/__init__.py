"""The speech-text model in plain PyTorch: reads as single-device code and imports nothing of `trainer/`."""
