"""Per-row device state, and how a sequence that takes a row sets it up."""

from collections.abc import Mapping

import numpy as np
import torch

from minisgl.core.batch import RowSetup
from minisgl.device import Device
from minisgl.kernels.sampling import MAX_BIASES, PARAM_WORDS, PARAMS, SEEN_IN_PROMPT, column
from minisgl.kernels.sampling.noise import row_key
from minisgl.trace import ranged

Sections = dict[str, np.ndarray]  # int32 arrays that travel to the device together

# What a row's sequence asks for beyond plain sampling: flags kept on the host.
ADJUSTS, LOGPROBS, PROMPT_LOGPROBS = 1, 2, 4


class RowBuffers:
    """R rows, the last of which is padding's; allocated once and never moved."""

    def __init__(self, device: Device, max_rows: int, max_pages: int, vocab: int) -> None:
        """vocab: V tokens. ValueError where there are too many rows for it."""
        rows, zeros = max_rows + 1, device.zeros
        if rows * vocab >= 2**31:
            raise ValueError(
                f"max_running_requests times the vocabulary ({vocab}) must stay below 2^31, "
                f"got {max_rows} requests"
            )
        self.last = zeros((rows,), torch.int32)  # last sampled token
        self.previous = zeros((rows,), torch.int32)  # before it; kept where there is a draft model
        self.lengths = zeros((rows,), torch.int32)  # the last one's position
        self.page_table = zeros((rows, max_pages), torch.int32)
        self.params = zeros((rows, PARAM_WORDS), torch.int32)
        column(self.params, "repetition_penalty").fill_(1.0)
        self.bias_ids = zeros((rows, MAX_BIASES), torch.int32)
        self.bias_values = zeros((rows, MAX_BIASES), torch.float32)
        self.counts = zeros((rows, vocab), torch.int32)  # see kernels.sampling
        self.counted = zeros((rows,), torch.int32)  # whether counts are kept for the row

    @property
    def padding(self) -> int:
        """The row of padding."""
        return self.last.shape[0] - 1

    @ranged("patch")
    def apply(self, sent: Mapping[str, torch.Tensor]) -> None:
        """Write uploaded setups and page-table patches, in the stream."""
        if "patch_index" in sent:
            self.page_table.view(-1)[sent["patch_index"]] = sent["patch_page"]
        if "setup_rows" not in sent:
            return
        records = sent["setup_params"].view(-1, PARAM_WORDS)
        self.params[sent["setup_rows"]] = records
        self.counted[sent["setup_rows"]] = column(records, "needs_counts")
        if "bias_index" in sent:
            self.bias_ids.view(-1)[sent["bias_index"]] = sent["bias_ids"]
            values = sent["bias_values"].view(torch.float32)
            self.bias_values.view(-1)[sent["bias_index"]] = values
        if "count_rows" in sent:
            counts = self.counts.view(-1)
            self.counts.index_fill_(0, sent["count_rows"].long(), 0)
            counts.index_fill_(0, sent["prompt_index"].long(), SEEN_IN_PROMPT)
            output = sent["output_index"]
            counts.index_add_(0, output, torch.ones_like(output))


class HostRows:
    """What the host remembers of each row's sequence, and the packing of setups."""

    def __init__(self, max_rows: int, vocab: int) -> None:
        self.flags = [0] * (max_rows + 1)
        self.setups: dict[int, RowSetup] = {}
        self._vocab = vocab

    def pack(self, setups: list[RowSetup]) -> Sections:
        """Remember the setups, and the arrays with which `RowBuffers.apply` writes them."""
        records = np.zeros(len(setups), PARAMS)
        bias: list[tuple[int, int, float]] = []
        count_rows, prompt_index, output_index = [], [], []
        for record, setup in zip(records, setups, strict=True):
            params = setup.params.completed()
            self.setups[setup.row] = setup
            entries = [(i, -np.inf) for i in setup.banned_ids if i < self._vocab]
            num_bans = len(entries)
            entries += [(i, value) for i, value in params.logit_bias if i < self._vocab]
            if len(entries) > MAX_BIASES:
                raise ValueError(
                    f"logit_bias, stop_token_ids and EOS ids together must be at most {MAX_BIASES},"
                    f" got {len(entries)}"
                )
            base = setup.row * MAX_BIASES
            bias += [(base + j, i, value) for j, (i, value) in enumerate(entries)]
            record["temperature"] = params.temperature
            record["top_p"] = params.top_p
            record["min_p"] = params.min_p
            record["repetition_penalty"] = params.repetition_penalty
            record["presence_penalty"] = params.presence_penalty
            record["frequency_penalty"] = params.frequency_penalty
            record["top_k"] = params.top_k
            record["min_length"] = setup.prompt_length + params.min_tokens
            record["num_bans"] = num_bans
            record["num_biases"] = len(entries)
            record["key"] = row_key(params.seed or 0, setup.choice)
            record["needs_counts"] = params.needs_counts
            self.flags[setup.row] = (
                ADJUSTS * (params.needs_counts or bool(entries))
                + LOGPROBS * (params.logprobs is not None)
                + PROMPT_LOGPROBS * (params.prompt_logprobs is not None)
            )
            if params.needs_counts:
                ids = np.array(setup.token_ids, np.int32) + setup.row * self._vocab
                count_rows.append(setup.row)
                prompt_index.append(ids[: setup.prompt_length])
                output_index.append(ids[setup.prompt_length :])
        sections: Sections = {
            "setup_rows": np.array([setup.row for setup in setups], np.int32),
            "setup_params": records.view(np.int32),
        }
        if bias:
            sections["bias_index"] = np.array([index for index, _, _ in bias], np.int32)
            sections["bias_ids"] = np.array([token_id for _, token_id, _ in bias], np.int32)
            values = np.array([value for _, _, value in bias], np.float32)
            sections["bias_values"] = values.view(np.int32)
        if count_rows:
            sections["count_rows"] = np.array(count_rows, np.int32)
            sections["prompt_index"] = np.concatenate(prompt_index)
            sections["output_index"] = np.concatenate(output_index)
        return sections
