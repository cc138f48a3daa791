"""Train nested transcoders on an activation store."""

from train.transcoder import Transcoder

__all__ = ["Transcoder"]
