"""From sequences to tensors: the cut into micro-batches, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from keel_trainer.sequences import TrainSequence


def cut_micro_batches(fed_lengths: Sequence[int], budget_tokens: int) -> list[range]:
    """Index ranges of the micro-batches of one mini-batch, in the order given (slot order).

    A micro-batch closes when one more sequence would take its padded size, sequences x longest,
    above the budget. A sequence longer than the budget stands alone. The cut is greedy, so a longer
    list never changes the closed micro-batches of a shorter one: scoring may run ahead of arrival.

    Example:
        cut_micro_batches([3, 3, 5, 9, 1], budget_tokens=10)
        -> [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens: {budget_tokens} is not valid; valid: 1 and above")
    cut: list[range] = []
    begin, longest = 0, 0
    for index, length in enumerate(fed_lengths):
        longest = max(longest, length)
        if index > begin and (index - begin + 1) * longest > budget_tokens:
            cut.append(range(begin, index))
            begin, longest = index, length
    if begin < len(fed_lengths):
        cut.append(range(begin, len(fed_lengths)))
    return cut


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded tensors of N sequences; T is the longest `fed_length`.

    Column t holds the fed token t and everything about predicting token t + 1.
    """

    input_ids_NT: Tensor  # int64; padding 0
    targets_NT: Tensor  # int64; the token that follows; padding 0
    fed_mask_NT: Tensor  # bool; real positions
    mask_NT: Tensor  # bool; the target is a response token of a valid sequence
    rollout_logprobs_NT: Tensor  # float32; 0 outside mask_NT
    advantages_NT: Tensor  # float32; 0 outside mask_NT
    length_weights_NT: Tensor  # float32; 1 / |y| on mask_NT, 0 elsewhere
    engine_routes_NTLK: Tensor | None  # uint8 or int16; None if no sequence has any
    routes_mask_NT: Tensor  # bool; real positions of valid sequences: where routes are replayed

    @property
    def tokens(self) -> int:
        """Valid response tokens."""
        return int(self.mask_NT.sum())


def collate(
    sequences: Sequence[TrainSequence],
    advantages_N: Sequence[float] | npt.NDArray | Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pads sequences to their longest; invalid ones are fed but masked out everywhere.

    Args:
        advantages_N: A of each; None means 0 (scoring, SFT).
        device: where the tensors go.
    """
    rows, columns = len(sequences), max(sequence.fed_length for sequence in sequences)
    if advantages_N is None:
        advantages_N = np.zeros(rows, np.float32)
    input_ids_NT = np.zeros((rows, columns), np.int64)
    targets_NT = np.zeros((rows, columns), np.int64)
    fed_mask_NT = np.zeros((rows, columns), bool)
    mask_NT = np.zeros((rows, columns), bool)
    rollout_logprobs_NT = np.zeros((rows, columns), np.float32)
    advantages_NT = np.zeros((rows, columns), np.float32)
    length_weights_NT = np.zeros((rows, columns), np.float32)
    routes_mask_NT = np.zeros((rows, columns), bool)
    routed = [sequence.routes_TLK for sequence in sequences if sequence.routes_TLK is not None]
    engine_routes_NTLK = (
        np.zeros((rows, columns, *routed[0].shape[1:]), routed[0].dtype) if routed else None
    )
    for row, (sequence, advantage) in enumerate(zip(sequences, advantages_N, strict=True)):
        fed = sequence.fed_length
        input_ids_NT[row, :fed] = sequence.token_ids_T[:-1]
        targets_NT[row, :fed] = sequence.token_ids_T[1:]
        fed_mask_NT[row, :fed] = True
        if not sequence.valid:
            continue
        response = slice(sequence.prompt_length - 1, fed)
        mask_NT[row, response] = True
        rollout_logprobs_NT[row, response] = sequence.rollout_logprobs_R
        advantages_NT[row, response] = float(advantage)
        length_weights_NT[row, response] = 1.0 / sequence.response_length
        routes_mask_NT[row, :fed] = True
        if engine_routes_NTLK is not None:
            if sequence.routes_TLK is None:
                raise ValueError(f"sequence {row} has no routes and others of its batch do")
            engine_routes_NTLK[row, :fed] = sequence.routes_TLK

    def tensor(array: npt.NDArray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        input_ids_NT=tensor(input_ids_NT),
        targets_NT=tensor(targets_NT),
        fed_mask_NT=tensor(fed_mask_NT),
        mask_NT=tensor(mask_NT),
        rollout_logprobs_NT=tensor(rollout_logprobs_NT),
        advantages_NT=tensor(advantages_NT),
        length_weights_NT=tensor(length_weights_NT),
        engine_routes_NTLK=None if engine_routes_NTLK is None else tensor(engine_routes_NTLK),
        routes_mask_NT=tensor(routes_mask_NT),
    )
