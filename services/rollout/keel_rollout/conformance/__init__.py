"""The contract's executable specification, run against an engine over gRPC: `keel conformance`.

Rows are functions in the modules `rows_*`, in the order of `catalogue.STAGES`; each proves one
sentence of the contract. The reference is a plain transformers forward (`reference`), and the kit
knows of the engine only what the wire tells. Quantized engines are outside it: their gap is a
choice, not a fault.
"""
