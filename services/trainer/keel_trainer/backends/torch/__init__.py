"""The torch backend: a Hugging Face model in one process, on the CPU or one CUDA device."""

from keel_trainer.backends.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
