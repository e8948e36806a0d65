"""RayBooth: fine-tune hundreds of DreamBooth subjects side by side, serve them in one batch."""

__version__ = "0.1.0"
