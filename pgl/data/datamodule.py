"""One LightningDataModule for every source of tokens."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import sentencepiece
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from pgl.data.shards import check_tokens, check_unchanged, read_shard, shard_state
from pgl.data.sources import Corpus, Source
from pgl.data.stream import BatchLayout, TokenStream, TrainLoader
from pgl.data.tokenizer import load_tokenizer
from pgl.evaluate import ByteTable, WindowLoader, audit_bytes, tokens_on
from pgl.io import sha256_file

MAX_SEQ_LEN = 1 << 20
MAX_BATCH_TOKENS = 1 << 28
MAX_BATCH_WINDOWS = 1 << 16


class TokenDataModule(pl.LightningDataModule):
    """Training batches and validation windows from one source of text.

    Training tokens come in the challenge's order, the same in every optimizer step whatever the
    number of devices; the Trainer's ``accumulate_grad_batches`` follows from ``batch_tokens``,
    ``micro_batch_tokens`` and the world size, and is set at run time. Validation reads
    non-overlapping windows of ``seq_len`` tokens unless a callback such as
    :class:`callbacks.SlidingWindowBPB` asks for others with :meth:`window_loader`.

    Example::

        data = TokenDataModule(Stdlib(), seq_len=256, batch_tokens=8192)
        Trainer(max_steps=100).fit(GolfModule(GPTConfig(model_dim=128, num_layers=4)), data)

    Args:
        source: Where the text comes from.
        seq_len: Tokens of one training sequence, and of one validation window.
        batch_tokens: Tokens of one optimizer step over all devices; part of the recipe.
        micro_batch_tokens: Tokens of one forward and backward pass on one device; a property of
            the hardware. None: as many as one device's share of a span (``batch_tokens /
            spans_per_batch``), the reference's choice.
        spans_per_batch: Contiguous spans in which a step's tokens are read; 8 in all four PRs.
        val_batch_windows: Windows scored in one forward pass on one device. None: 262,144 tokens on
            CUDA, 32 windows elsewhere.
        max_val_tokens: Score only the first so many validation tokens. None: all of them.
        audit_tokens: How many validation tokens are decoded to check the byte count before a score
            is reported. None: all of them.
    """

    def __init__(
        self,
        source: Source,
        seq_len: int = 1024,
        batch_tokens: int = 524_288,
        micro_batch_tokens: int | None = None,
        spans_per_batch: int = 8,
        val_batch_windows: int | None = None,
        max_val_tokens: int | None = None,
        audit_tokens: int | None = 4_000_000,
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("seq_len", seq_len, MAX_SEQ_LEN),
            ("batch_tokens", batch_tokens, MAX_BATCH_TOKENS),
            ("val_batch_windows", val_batch_windows, MAX_BATCH_WINDOWS),
        ):
            if value is not None and not 0 < value <= most:
                raise ValueError(f"data.{name} must be from 1 to {most}, got {value}")
        if max_val_tokens is not None and max_val_tokens < 2:
            raise ValueError(f"data.max_val_tokens must be at least 2, got {max_val_tokens}")
        if audit_tokens is not None and audit_tokens < 2:
            raise ValueError(f"data.audit_tokens must be at least 2, got {audit_tokens}")
        self.source = source
        self.seq_len = seq_len
        self.batch_tokens = batch_tokens
        if spans_per_batch <= 0:
            raise ValueError(f"data.spans_per_batch must be positive, got {spans_per_batch}")
        if spans_per_batch > batch_tokens:
            raise ValueError(
                f"data.spans_per_batch={spans_per_batch} must not exceed "
                f"data.batch_tokens={batch_tokens}"
            )
        if micro_batch_tokens is None:
            micro_batch_tokens = batch_tokens // spans_per_batch
        self.micro_batch_tokens = micro_batch_tokens
        self.spans_per_batch = spans_per_batch
        self.val_batch_windows = val_batch_windows
        self.max_val_tokens = max_val_tokens
        self.audit_tokens = audit_tokens
        self.layout = self._layout(world_size=1, rank=0)
        self.val_windows: Callable[[], WindowLoader] | None = None
        """Makes the loader of ``validate`` and ``test`` in place of :meth:`chunk_loader`."""

    @override
    def prepare_data(self) -> None:
        """Called on one process of each node: download, tokenise, or find the shards."""
        self.source.prepare()

    @override
    def setup(self, stage: str) -> None:
        """Called on every process: open the shards, audit the byte count, size the batches."""
        if not hasattr(self, "corpus"):
            self.corpus: Corpus = self.source.corpus()
            self.tokenizer: sentencepiece.SentencePieceProcessor = load_tokenizer(
                self.corpus.tokenizer_path
            )
            self.vocab_size: int = self.tokenizer.vocab_size()
            self.bos_id: int = self.tokenizer.bos_id()
            self.tokenizer_sha256 = sha256_file(self.corpus.tokenizer_path)
            self.byte_table = ByteTable.from_tokenizer(self.corpus.tokenizer_path, self.vocab_size)
        if stage != "predict":
            self._open_validation()
        if stage == "fit":
            self.stream = TokenStream(self.corpus.train_shards, self.vocab_size)
            self._set_accumulation()

    @override
    def train_dataloader(self) -> TrainLoader:
        """Return this rank's micro-batches, (S, T+1) int32 each, from the Trainer's step on."""
        loader = TrainLoader(self.stream, self.layout, pin_memory=torch.cuda.is_available())
        if self.trainer is not None:
            # Lightning restores a loader's position only if its epoch was cut short.
            loader.load_state_dict({"step": self.trainer.global_step})
        return loader

    @override
    def val_dataloader(self) -> WindowLoader:
        """Return this rank's share of the validation windows."""
        return self.val_windows() if self.val_windows else self.chunk_loader()

    @override
    def test_dataloader(self) -> WindowLoader:
        """Return the validation windows: the challenge has no other split."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader:
        """Return the encoded prompts set by :meth:`set_prompts`, one (T,) tensor each."""
        bos = self.tokenizer.bos_id()
        prompts = [torch.tensor([bos, *self.tokenizer.encode(text)]) for text in self.prompts]
        # Lightning takes a bare list for a list of loaders, one for each prompt.
        return DataLoader(prompts, batch_size=None)

    def set_prompts(self, prompts: list[str]) -> None:
        """Choose the texts that ``predict`` continues."""
        self.prompts = prompts

    def chunk_loader(self) -> WindowLoader:
        """Return this rank's share of non-overlapping windows of ``seq_len`` tokens."""
        return self.window_loader(self.seq_len, self.seq_len)

    def window_loader(
        self,
        seq_len: int,
        stride_tokens: int,
        batch_windows: int | None = None,
        tail: str = "exact",
    ) -> WindowLoader:
        """Return this rank's share of the windows that score every validation target once.

        Args:
            seq_len: Tokens of one window.
            stride_tokens: Tokens between window starts; ``seq_len`` gives chunks.
            batch_windows: Windows of one forward pass. None: ``val_batch_windows``.
            tail: What the last windows score; see :func:`pgl.evaluate.sliding_windows`.
        """
        world_size, rank = self._world()
        device = torch.device("cpu")
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
        if self._val_tokens_N is None or self._val_tokens_N.device != device:
            self._val_tokens_N = tokens_on(device, self.val_tokens)
        return WindowLoader(
            self._val_tokens_N,
            seq_len=seq_len,
            stride=stride_tokens,
            batch_windows=batch_windows or self.val_batch_windows,
            tail=tail,
            rank=rank,
            world_size=world_size,
            device=device,
        )

    def calibration_layout(self, num_sequences: int) -> BatchLayout:
        """Return how the first training sequences are shared out over ranks and micro-batches.

        Raises:
            ValueError: If they cannot be shared out evenly.
        """
        world_size, rank = self._world()
        if num_sequences % world_size:
            raise ValueError(
                f"artifact.calibration_sequences={num_sequences} must be a multiple of the "
                f"{world_size} devices"
            )
        per_micro_batch = math.gcd(num_sequences // world_size, self.layout.sequences)
        return BatchLayout(
            batch_tokens=num_sequences * self.seq_len,
            seq_len=self.seq_len,
            micro_batch_tokens=per_micro_batch * self.seq_len,
            spans_per_batch=1,
            world_size=world_size,
            rank=rank,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged to go on with the same tokens."""
        return {
            "tokenizer_sha256": self.tokenizer_sha256,
            "batch_tokens": self.batch_tokens,
            "seq_len": self.seq_len,
            "spans_per_batch": self.spans_per_batch,
            "train_tokens": self.stream.total_tokens,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse data that a checkpoint does not fit.

        Raises:
            ValueError: If the tokenizer, or when training the order of the tokens, is another.
        """
        self.check_tokenizer(state_dict["tokenizer_sha256"])
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, now in self.state_dict().items():
            if state_dict[name] != now:
                raise ValueError(
                    f"the checkpoint was written with data.{name}={state_dict[name]}, this run has "
                    f"{now}: resume with the run's own config.yaml, or its data settings"
                )

    def check_tokenizer(self, sha256: str) -> None:
        """Compare a model's tokenizer with the data's.

        Raises:
            ValueError: If they differ.
        """
        if sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"the model was trained with the tokenizer {sha256[:12]}, the data's is "
                f"{self.tokenizer_sha256[:12]}: set data.source to the text it was trained on"
            )

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data of a run: names, counts and hashes.

        Raises:
            ShardError: If a shard is no longer as the run has read it.
        """
        if hasattr(self, "stream"):
            self.stream.check_unchanged()
        for path, state in zip(self.corpus.val_shards, self._val_states, strict=True):
            check_unchanged(path, state)
        return {
            "source": self.corpus.name,
            "tokenizer": self.corpus.tokenizer_path.name,
            "tokenizer_sha256": self.tokenizer_sha256,
            "train_shards": {path.name: sha256_file(path) for path in self.corpus.train_shards},
            "val_shards": {path.name: sha256_file(path) for path in self.corpus.val_shards},
            "train_tokens": self.stream.total_tokens if hasattr(self, "stream") else None,
            "val_targets": len(self.val_tokens) - 1,
            "val_split_targets": self.val_split_tokens - 1,
            # Measured on the whole split, so it says nothing about a part of it.
            "val_xz_bits_per_byte": None
            if self.max_val_tokens
            else self.corpus.val_xz_bits_per_byte,
        }

    def _open_validation(self) -> None:
        self._val_states = [shard_state(path) for path in self.corpus.val_shards]
        shards = [read_shard(path) for path in self.corpus.val_shards]
        for path, shard in zip(self.corpus.val_shards, shards, strict=True):
            check_tokens(shard, self.vocab_size, path)
        tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)
        self.val_split_tokens = len(tokens)
        self.val_tokens: np.ndarray = tokens[: self.max_val_tokens]
        self._val_tokens_N: torch.Tensor | None = None  # on the device that scores them
        audited = audit_bytes(
            self.byte_table,
            self.tokenizer,
            self.val_tokens,
            bos_id=self.bos_id,
            max_tokens=self.audit_tokens,
        )
        rank_zero_info(f"byte count audited against decoded text: {audited}")

    def _set_accumulation(self) -> None:
        trainer = self.trainer
        if trainer is None:
            return
        # overfit_batches sets it too. An int counts batches: 1 is one of them, 1.0 is all.
        limit = trainer.limit_train_batches
        if (isinstance(limit, int) or limit < 1) and not trainer.fast_dev_run:
            raise ValueError(
                "trainer.limit_train_batches and trainer.overfit_batches cut optimizer steps "
                "short, where the budget's clock is read: leave them out and set budget.steps"
            )
        world_size, rank = self._world()
        self.layout = self._layout(world_size, rank)
        if trainer.accumulate_grad_batches not in (1, self.layout.accumulate):
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} does not fit: "
                "leave it at 1, it follows from data.batch_tokens and data.micro_batch_tokens"
            )
        trainer.accumulate_grad_batches = self.layout.accumulate

    def _layout(self, world_size: int, rank: int) -> BatchLayout:
        return BatchLayout(
            batch_tokens=self.batch_tokens,
            seq_len=self.seq_len,
            micro_batch_tokens=self.micro_batch_tokens,
            spans_per_batch=self.spans_per_batch,
            world_size=world_size,
            rank=rank,
        )

    def _world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank
