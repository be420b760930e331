"""Keel's trainer service: MiniRL with routing replay."""
