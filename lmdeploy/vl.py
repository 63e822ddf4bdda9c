"""`from lmdeploy.vl import load_image`: the public name of the picture loader."""

from lmdeploy.vision.load import load_image

__all__ = ["load_image"]
