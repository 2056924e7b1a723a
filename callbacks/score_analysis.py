"""Where the nats of a score fell, in TensorBoard: by position, by document, and the worst texts."""

import html

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from pgl.evaluate import ScoreMap, document_scores, worst_documents

POSITION_BINS = 64
WORST_DOCUMENTS = 10
SHOWN_CHARACTERS = 400


def log_analysis(trainer: pl.Trainer, name: str, score_map: ScoreMap) -> None:
    """Write what a score is made of.

    ``analysis/<name>/loss_by_position`` is a curve whose step is the position in the window;
    ``document_bpb`` a histogram; ``worst_documents`` a text.

    Args:
        trainer: Its logger is written to if it is a TensorBoardLogger, its data module decodes.
        name: Which score.
        score_map: The scores of all ranks.
    """
    if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
        return
    writer, data, step = trainer.logger.experiment, trainer.datamodule, trainer.global_step
    for position, nats in binned_by_position(score_map):
        writer.add_scalar(f"analysis/{name}/loss_by_position", nats, position)
    documents = document_scores(
        score_map.nats(), data.val_tokens, data.byte_table, data.tokenizer.bos_id()
    )
    if not documents:
        return
    bpb_D = np.array([document.bpb for document in documents])
    writer.add_histogram(f"analysis/{name}/document_bpb", bpb_D, step)
    lines = ["| bits per byte | bytes | document | text |", "|---|---|---|---|"]
    for document in worst_documents(documents, WORST_DOCUMENTS):
        text = data.tokenizer.decode(data.val_tokens[document.start : document.stop].tolist())
        shown = html.escape(" ".join(text[:SHOWN_CHARACTERS].split())).replace("|", "&#124;")
        lines.append(f"| {document.bpb:.3f} | {document.bytes:,} | {document.index:,} | {shown} |")
    writer.add_text(f"analysis/{name}/worst_documents", "\n".join(lines), step)


def binned_by_position(score_map: ScoreMap) -> list[tuple[int, float]]:
    """Return at most 64 pairs of a position and the mean nats from it to the next pair's.

    Positions where nothing was scored are left out.
    """
    nats_S, times_S = score_map.nats_by_position(), score_map.times_by_position()
    width = -(-len(nats_S) // POSITION_BINS)
    pairs = []
    for start in range(0, len(nats_S), width):
        times = times_S[start : start + width]
        if times.sum() > 0:
            nats = np.nan_to_num(nats_S[start : start + width])
            pairs.append((start, float((nats * times).sum() / times.sum())))
    return pairs
