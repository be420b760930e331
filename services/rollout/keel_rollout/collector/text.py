"""Text to token ids and back, by the tokenizer of the run's base artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from keel.errors import DatasetError, ModelError
from keel.presets import END
from keel_rollout.collector.chat import ChatTemplate, TemplateFault
from keel_rollout.collector.tasks.base import Problem, Prompt


class TextCodec:
    """Prompts and responses of one run as token ids.

    Tasks and verifiers write `keel.presets.END` where a response ends; here that is the model's own
    end token.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_ids: tuple[int, ...], template: ChatTemplate | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.end_ids = end_ids
        """Token ids that end a response; the first is the one to write."""
        self.template = template
        """For chat messages; None: there is none."""
        self.most_tokens: int | None = None
        """Positions of the model, if its folder says so."""

    @classmethod
    def from_artifact(cls, folder: Path, chat_template: str | None = None) -> TextCodec:
        """From tokenizer.json, or ModelError saying what is missing.

        The end tokens: the tokenizer's END; what tokenizer_config.json has as eos_token (a chat
        model's end of turn); what config.json and generation_config.json name as eos_token_id.

        Args:
            chat_template: the job's own, its text or a path.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"artifact: {str(path)!r} is not a file; valid: a model folder on storage that "
                "trainer and collector see under the same path"
            )
        tokenizer = Tokenizer.from_file(str(path))
        template = ChatTemplate.from_artifact(folder, chat_template)
        codec = cls(tokenizer, _end_ids(tokenizer, folder), template)
        codec.most_tokens = _read(folder, "config.json").get("max_position_embeddings")
        return codec

    def prompt_ids(self, prompt: Prompt, where: str = "prompt") -> npt.NDArray[np.int32]:
        """int32 [P]: text as it is, without special tokens; messages by the chat template.

        Args:
            where: stands before what the template complains of.

        Raises:
            ModelError: chat messages, and no template.
            TemplateFault: the template refuses them.
        """
        try:
            return self._ids(prompt, where)
        except TemplateFault as error:
            raise TemplateFault(f"{where}: the chat template does not take it: {error}") from error

    def _ids(self, prompt: Prompt, where: str) -> npt.NDArray[np.int32]:
        if not isinstance(prompt, str):
            if self.template is None:
                raise ModelError(
                    f"model.chat_template: missing, and {where} has chat messages; the model's "
                    "folder has no template either; valid: a Jinja template in the job"
                )
            prompt = self.template.render(prompt)
        return np.array(self._tokenizer.encode(prompt, add_special_tokens=False).ids, np.int32)

    def check(self, problem: Problem) -> None:
        """DatasetError if its prompt does not come out as tokens, which would end the run later."""
        field, _, rest = problem.where.partition(": ")
        path, _, line = rest.rpartition(": ")
        try:
            if not len(self._ids(problem.prompt, problem.where)):
                raise DatasetError(field, path, f"{line}: no token is left of its prompt")
        except TemplateFault as error:
            roles = [message["role"] for message in problem.prompt if not isinstance(message, str)]
            told = f"{line}: the chat template does not take roles {', '.join(roles)}: {error}"
            raise DatasetError(field, path, told) from error

    def check_length(self, prompt: Prompt, response: str, where: str) -> None:
        """DatasetError if a demonstration is longer than the model takes."""
        tokens = len(self.prompt_ids(prompt, where)) + len(self.response_ids(response))
        if self.most_tokens is not None and tokens > self.most_tokens:
            field, _, rest = where.partition(": ")
            raise DatasetError(
                field,
                rest,
                f"prompt and response have {tokens} tokens; valid: up to "
                f"{self.most_tokens}, the model's positions",
            )

    def response_ids(self, response: str) -> npt.NDArray[np.int32]:
        """int32 [R]: a demonstration's response."""
        ids = self._tokenizer.encode(response.removesuffix(END), add_special_tokens=False).ids
        return np.array([*ids, self.end_ids[0]] if response.endswith(END) else ids, np.int32)

    def finished(self, token_ids_R: npt.NDArray[np.int32]) -> bool:
        """Whether the model ended the response."""
        return len(token_ids_R) > 0 and int(token_ids_R[-1]) in self.end_ids

    def response_text(self, token_ids_R: npt.NDArray[np.int32]) -> str:
        """A sampled response: special tokens show, and END stands for the end token."""
        ids = token_ids_R.tolist()
        if self.finished(token_ids_R):
            return self._tokenizer.decode(ids[:-1], skip_special_tokens=False) + END
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def clean_text(self, token_ids_R: npt.NDArray[np.int32]) -> str:
        """A sampled response as people read it: no end token, no special tokens."""
        ids = token_ids_R.tolist()
        return self._tokenizer.decode(
            ids[:-1] if self.finished(token_ids_R) else ids, skip_special_tokens=True
        )


def _end_ids(tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """In the order to write them, each once."""
    eos = _read(folder, "tokenizer_config.json").get("eos_token")
    written = [END, eos.get("content") if isinstance(eos, dict) else eos]
    ends = [tokenizer.token_to_id(token) for token in written if token]
    for file in ("config.json", "generation_config.json"):
        named = _read(folder, file).get("eos_token_id")
        ends += named if isinstance(named, list) else [named]
    found = tuple(dict.fromkeys(end for end in ends if end is not None))
    if not found:
        raise ModelError(
            f"artifact: {str(folder)!r} has no end-of-sequence token; valid: {END!r} in "
            "tokenizer.json, eos_token in tokenizer_config.json, or eos_token_id in config.json or "
            "generation_config.json"
        )
    return found


def _read(folder: Path, file: str) -> dict[str, Any]:
    path = folder / file
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    assert isinstance(data, dict)
    return data
