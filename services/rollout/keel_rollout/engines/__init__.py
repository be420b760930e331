"""Inference engines behind the protobuf contract, one folder each."""
