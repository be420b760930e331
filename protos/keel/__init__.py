"""Keel's wire contract: messages, codecs, stream names, the run schema. No torch, no redis."""

__version__ = "0.1.0"
