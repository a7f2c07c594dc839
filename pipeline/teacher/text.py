"""The text side of diffusion models: tokens with their character spans, and their encoding.

A model reads text at T positions. They are one stream of tokens (Stable Diffusion 1 and 2: CLIP; XL: two CLIPs that
share their tokens; Flux: T5) or two one after the other (Stable Diffusion 3: CLIP, then T5), so a word may have
several ranges of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.errors import UserError
from pipeline.teacher.windows import Span, overlapping

UNBOUNDED = 100_000  # tokenizers without a limit of their own report an absurdly large one
SD3_T5 = 256  # positions of T5 in the published pipelines
FLUX_T5 = 512


@dataclass
class Condition:
    """Encoded text of a batch of windows.

    Args:
        hidden_BTC: what the attention reads.
        content_BT: 1.0 where a position holds a content token, else 0.
        pooled_BC: the text as one vector, for models that take it.
    """

    hidden_BTC: torch.Tensor
    content_BT: torch.Tensor
    pooled_BC: torch.Tensor | None = None


class Tokens:
    """A tokenizer with a fixed number of positions.

    Ids are put together here (start, content, end, padding) instead of by the tokenizer's own padding, because that
    changes the tokenizer's state and would tie threads to each other.

    Args:
        positions: ids per text; by default the tokenizer's or encoder's own limit.

    Raises:
        UserError: a tokenizer that cannot tell which characters a token came from.
    """

    def __init__(self, tokenizer, positions: int):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{type(tokenizer).__name__} gives no character offsets: save it with a tokenizer.json")
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        bos = getattr(tokenizer, "bos_token_id", None)
        self.start = [] if bos is None else [bos]
        self.end = [tokenizer.eos_token_id]
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.positions = positions
        self.limit = positions - len(self.start) - len(self.end)

    def count(self, text: str) -> int:
        """Content tokens of a text."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def spans(self, text: str) -> list[Span]:
        """Character spans of the content tokens of a text, in order. Content token i is at text position
        `len(self.start) + i`. The bytes of one character may lie in several tokens, which then share its span."""
        return [tuple(span) for span in self._backend.encode(text, add_special_tokens=False).offsets]

    def ids(self, texts: Sequence[str], device: torch.device, cut: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """ids_BT and content_BT of texts; with `cut` a text may be too long and loses its end."""
        ids, content = [], []
        for text in texts:
            own = self._backend.encode(text, add_special_tokens=False).ids
            own = own[: self.limit] if cut else own
            assert len(own) <= self.limit, f"{len(own)} tokens in a window of {self.limit}"
            row = [*self.start, *own, *self.end]
            ids.append(row + [self.pad] * (self.positions - len(row)))
            first = len(self.start)
            content.append([float(first <= i < first + len(own)) for i in range(self.positions)])
        return torch.tensor(ids, device=device), torch.tensor(content, device=device)


class ClipText:
    """One CLIP text encoder (Stable Diffusion 1.x, 2.x): the last hidden states."""

    def __init__(self, parts: dict):
        self.encoder = parts["text_encoder"]
        self.streams = [Tokens(parts["tokenizer"], clip_positions(parts["tokenizer"], self.encoder))]

    @property
    def limit(self) -> int:
        """Content tokens that a window may have."""
        return min(stream.limit for stream in self.streams)

    @property
    def positions(self) -> int:
        """T, over all streams."""
        return sum(stream.positions for stream in self.streams)

    def count(self, text: str) -> int:
        """Content tokens of a text: of the stream that needs most."""
        return max(stream.count(text) for stream in self.streams)

    def spans(self, text: str) -> list[Span]:
        """Character spans of the first stream's content tokens."""
        return self.streams[0].spans(text)

    def ranges(self, text: str, spans: Sequence[Span]) -> list[list[list[int]]]:
        """For each character span of a window the text positions in each stream that share characters with it."""
        out: list[list[list[int]]] = [[] for _ in spans]
        offset = 0
        for stream in self.streams:
            own = stream.spans(text)
            for index, span in enumerate(spans):
                found = [offset + len(stream.start) + i for i in overlapping(span, own)]
                if found:
                    out[index].append(found)
            offset += stream.positions
        return out

    def encode(self, texts: Sequence[str], device: torch.device) -> Condition:
        """Encodes windows, each at most `limit` content tokens."""
        ids, content_BT = self.streams[0].ids(texts, device)
        return Condition(self.encoder(ids)[0], content_BT)


class TwoClipText(ClipText):
    """Two CLIP text encoders side by side (Stable Diffusion XL): hidden states before the last layer, joined in
    width, and the pooled vector of the second. Both tokenizers cut text alike and differ in padding only."""

    def __init__(self, parts: dict):
        super().__init__(parts)
        self.second = parts["text_encoder_2"]
        self.tokens_2 = Tokens(parts["tokenizer_2"], self.streams[0].positions)

    def encode(self, texts: Sequence[str], device: torch.device) -> Condition:
        ids, content_BT = self.streams[0].ids(texts, device)
        ids_2, content_2 = self.tokens_2.ids(texts, device)
        assert torch.equal(content_BT, content_2), "the two tokenizers cut this text differently"
        first = self.encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids_2, output_hidden_states=True)
        return Condition(torch.cat([first, second.hidden_states[-2]], dim=-1), content_BT, second[0])


class SD3Text(ClipText):
    """Two CLIPs joined in width, then T5 (or zeros in its place): Stable Diffusion 3. A word has a range in each."""

    def __init__(self, parts: dict):
        super().__init__(parts)
        self.second = parts["text_encoder_2"]
        self.tokens_2 = Tokens(parts["tokenizer_2"], self.streams[0].positions)
        self.t5 = parts.get("text_encoder_3")
        self.width = parts["transformer"].config.joint_attention_dim
        if self.t5 is not None:
            self.streams.append(Tokens(parts["tokenizer_3"], SD3_T5))

    @property
    def positions(self) -> int:
        return self.streams[0].positions + SD3_T5

    def encode(self, texts: Sequence[str], device: torch.device) -> Condition:
        ids, content_BT = self.streams[0].ids(texts, device)
        ids_2, _ = self.tokens_2.ids(texts, device)
        first = self.encoder(ids, output_hidden_states=True)
        second = self.second(ids_2, output_hidden_states=True)
        clip_BTC = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip_BTC = F.pad(clip_BTC, (0, self.width - clip_BTC.shape[-1]))
        if self.t5 is None:
            t5_BTC = clip_BTC.new_zeros(len(texts), SD3_T5, self.width)
            content_3 = content_BT.new_zeros(len(texts), SD3_T5)
        else:
            ids_3, content_3 = self.streams[1].ids(texts, device)
            t5_BTC = self.t5(ids_3)[0]
        return Condition(
            torch.cat([clip_BTC, t5_BTC.to(clip_BTC.dtype)], dim=1),
            torch.cat([content_BT, content_3], dim=1),
            torch.cat([first[0], second[0]], dim=-1),
        )


class FluxText(ClipText):
    """T5 for the attention; CLIP's pooled vector, for which a long text is cut as the published pipeline does."""

    def __init__(self, parts: dict):
        self.encoder = parts["text_encoder"]
        self.pooled = Tokens(parts["tokenizer"], clip_positions(parts["tokenizer"], self.encoder))
        self.t5 = parts["text_encoder_2"]
        self.streams = [Tokens(parts["tokenizer_2"], FLUX_T5)]

    def encode(self, texts: Sequence[str], device: torch.device) -> Condition:
        ids, content_BT = self.streams[0].ids(texts, device)
        clip_ids, _ = self.pooled.ids(texts, device, cut=True)
        return Condition(self.t5(ids)[0], content_BT, self.encoder(clip_ids).pooler_output)


def clip_positions(tokenizer, encoder) -> int:
    """Positions of a CLIP text encoder; 77 in all published ones."""
    stated = tokenizer.model_max_length if tokenizer.model_max_length < UNBOUNDED else UNBOUNDED
    return min(stated, getattr(encoder.config, "max_position_embeddings", UNBOUNDED))
