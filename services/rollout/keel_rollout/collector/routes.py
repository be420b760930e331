"""The routes of one response, chunk by chunk: checked as they come, and held once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from keel import codec
from keel.errors import WireError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import tensor_pb2


class RoutesReader:
    """Takes chunks of `[rows, L, K]` in; gives `[T - 1, L, K]` out, or what is wrong with it.

    What is wrong is data, not an error: the response is then invalid.
    """

    def __init__(self, signature: pb.ModelSignature) -> None:
        self._layers, self._top_k = len(signature.moe_layers), signature.experts_per_token
        self._experts = signature.num_experts
        self._dtype = codec.routes_dtype(signature.num_experts)
        self._bytes = bytearray()  # grows in place; a list of chunks would be joined at twice that
        self._rows = 0
        self._unreadable = self._misrouted = ""

    def add(self, tensor: tensor_pb2.Tensor) -> None:
        """Takes the next rows."""
        self._rows += tensor.shape[0] if tensor.shape else 0
        if self._unreadable:
            return
        try:
            shape = (None, self._layers, self._top_k)
            chunk_TLK = codec.to_ndarray(
                tensor, "chunk.routes", dtypes=(self._dtype.name,), shape=shape
            )
        except WireError as error:
            self._unreadable = f"invalid routes: {error}"
            return
        self._misrouted = self._misrouted or self._wrong(chunk_TLK)
        self._bytes += chunk_TLK.data.cast("B") if chunk_TLK.size else b""

    def read(
        self, complete: pb.SequenceComplete, rows: int
    ) -> tuple[npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None, str]:
        """The routes, or None and what is wrong with them. To be called once.

        Args:
            rows: T - 1, as many as are due.
        """
        if not complete.routes_valid:
            return None, "the engine does not vouch for its routes"
        if self._rows != rows or complete.route_rows != rows:
            told = f"{self._rows} rows sent, {complete.route_rows} said, {rows} due"
            return None, f"invalid routes: {told}"
        if self._unreadable:
            return None, self._unreadable
        if codec.xxh3(self._bytes) != complete.routes_xxh3:
            return None, "invalid routes: they differ from the engine's checksum"
        if self._misrouted:
            return None, self._misrouted
        routes_TLK = np.frombuffer(self._bytes, self._dtype)
        return routes_TLK.reshape(rows, self._layers, self._top_k), ""

    def _wrong(self, routes_TLK: npt.NDArray) -> str:
        if int(routes_TLK.max(initial=0)) >= self._experts:
            return f"invalid routes: expert {routes_TLK.max()} of {self._experts}"
        ordered_TLK = np.sort(routes_TLK, axis=-1)
        if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
            return "invalid routes: an expert is repeated in a row"
        return ""
