"""Text to token ids and back, by the tokenizer of the run's base artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from keel.errors import ModelError
from keel.presets import END


class TextCodec:
    """Prompts and responses of one run as token ids.

    Tasks and verifiers write `keel.presets.END` where a response ends; here that is the model's own
    end token.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.end_ids = end_ids
        """Token ids that end a response; the first is the one to write."""

    @classmethod
    def from_artifact(cls, folder: Path) -> TextCodec:
        """From tokenizer.json, or ModelError saying what is missing.

        The end token is the tokenizer's END; else what config.json names as eos_token_id.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"artifact: {str(path)!r} is not a file; valid: a model folder on storage that "
                "trainer and collector see under the same path"
            )
        tokenizer = Tokenizer.from_file(str(path))
        end_id = tokenizer.token_to_id(END)
        return cls(tokenizer, (end_id,) if end_id is not None else _configured_end(folder))

    def prompt_ids(self, prompt: str) -> npt.NDArray[np.int32]:
        """int32 [P]: the prompt as it is, without special tokens."""
        return np.array(self._tokenizer.encode(prompt, add_special_tokens=False).ids, np.int32)

    def response_ids(self, response: str) -> npt.NDArray[np.int32]:
        """int32 [R]: a demonstration's response."""
        ids = self._tokenizer.encode(response.removesuffix(END), add_special_tokens=False).ids
        return np.array([*ids, self.end_ids[0]] if response.endswith(END) else ids, np.int32)

    def response_text(self, token_ids_R: npt.NDArray[np.int32]) -> str:
        """A sampled response: special tokens show, and END stands for the end token."""
        ids = token_ids_R.tolist()
        if ids and ids[-1] in self.end_ids:
            return self._tokenizer.decode(ids[:-1], skip_special_tokens=False) + END
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _configured_end(folder: Path) -> tuple[int, ...]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ends = config.get("eos_token_id")
    if isinstance(ends, int):
        return (ends,)
    if not ends:
        raise ModelError(
            f"artifact: {str(folder)!r} has no end-of-sequence token; valid: {END!r} in "
            "tokenizer.json, or eos_token_id in config.json"
        )
    return tuple(ends)
