"""sentence-transformers' ranking losses in memory O(N D): drop-in classes, with the values and gradients of theirs.

One line of a training script changes::

    from sclkern.integrations.sentence_transformers import MultipleNegativesRankingLoss

Each class is a subclass of the package's, which embeds, caches and replays; only the similarities of all pairs, which
it holds in memory, are computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sclkern.distributed import gather, stack, world_size
from sclkern.errors import UserError
from sclkern.ops import completion_loss

try:
    import sentence_transformers as package
    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers.sentence_transformer import losses
except ImportError as error:
    raise UserError(
        f"sentence_transformers: cannot be imported ({error}); pip install 'sentence-transformers[train]>=6'"
    ) from error

if int(package.__version__.split(".")[0]) < 6:
    raise UserError(
        f"sentence_transformers: got {package.__version__}, expected 6 or newer, whose losses have the hooks that are "
        "used here; pip install --upgrade 'sentence-transformers[train]>=6'"
    )

# Similarities in memory where they are not computed by the op: 16 MiB.
MAX_SCORES = 2**22

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Similarity = Callable[[Tensor, Tensor], Tensor]


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """The package's ``MultipleNegativesRankingLoss``, whose N x M similarities are not held in memory.

    Args:
        model: the SentenceTransformer.
        scale: factor of the similarities, positive.
        similarity_fct: ``util.cos_sim`` or ``util.dot_score`` of the package.
        gather_across_devices: contrast with the rows of all ranks, which must have the same number each; the value is
            that of the rows of this rank, and the gradient reaches the embeddings of all.
        directions: what each row is contrasted with, as in the package.
        partition_mode: "joint" or "per_direction", as in the package.
        hardness_mode: None, or "hard_negatives"; the others are not supported.
        hardness_strength: as in the package.

    Raises:
        UserError: a ``similarity_fct`` or ``hardness_mode`` that is not supported. ValueError: what the package
            refuses.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Similarity = util.cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength,
        )  # fmt: skip
        self._check()

    def _check(self) -> None:
        """Also before each loss: the package lets its attributes be set."""
        if self.similarity_fct not in (util.cos_sim, util.dot_score):
            name = getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__)
            raise UserError(
                f"similarity_fct: got {name}, expected cos_sim or dot_score of sentence_transformers.util; the "
                "package's own loss takes others"
            )
        if self.hardness_mode in ("in_batch_negatives", "all_negatives") and self.hardness_strength > 0:
            raise UserError(
                f"hardness_mode: got {self.hardness_mode!r}, expected None or 'hard_negatives'; the package's own loss "
                "takes it"
            )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            embeddings: (N, D) of the anchors, of their positives, and of each column of negatives.
            labels: not used, as in the package.

        Returns:
            Scalar float32, or float64 for float64 embeddings.

        Raises:
            UserError: as the class; ValueError: fewer than two columns.
        """
        self._check()
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: got {len(embeddings)}, expected 2 at least: anchors and positives")
        world = world_size() if self.gather_across_devices else 1
        rank = dist.get_rank() if world > 1 else 0
        rows = self._rows(embeddings[0], embeddings[1:], rank)
        mean, own = rows.mean(), len(embeddings[0])
        # The package's loss is that of the rows of this rank, and its gradient that of the losses of all ranks.
        return mean if world == 1 else mean + (rows[rank * own : (rank + 1) * own].mean() - mean).detach()

    def _rows(self, queries: Tensor, documents: list[Tensor], rank: int) -> Tensor:
        """Losses of the rows of all ranks.

        A softmax with a query, or its document, as the anchor and the positive among the candidates is a
        ``completion_loss``: a(i) = log sum exp of the scores of row i, less that of its positive. A joint softmax over
        both anchors adds their sums up: log(exp a(i) + exp b(i)).
        """
        positives, directions = documents[0], set(self.directions)
        row = rank * len(queries) + torch.arange(len(queries), device=queries.device)
        hard = self.hardness_mode == "hard_negatives" and self.hardness_strength > 0 and len(documents) > 1
        if self.partition_mode == "per_direction" and "doc_to_query" in directions and not hard:
            return self._contrast(queries, documents, None, "both") / 2
        # Of one id is what a row does not compete with, such as its own query.
        ids = [row, *[row if hard else torch.full_like(row, -1)] * (len(documents) - 1)]
        candidates = list(documents)
        if "query_to_query" in directions:
            candidates, ids = [*candidates, queries], [*ids, row]
        of_query = self._contrast(queries, candidates, torch.cat(ids))
        if hard:
            of_query = torch.logaddexp(of_query, self._hard_negatives(queries, documents))
        if "doc_to_query" not in directions:
            if "doc_to_doc" in directions:
                of_query = torch.logaddexp(of_query, self._other_documents(queries, documents, row))
            return of_query
        candidates = [queries, *documents] if "doc_to_doc" in directions else [queries]
        of_document = self._contrast(positives, candidates, row.repeat(len(candidates)))
        if self.partition_mode == "per_direction":
            return (of_query + of_document) / 2
        return torch.logaddexp(of_query, of_document)

    def _hard_negatives(self, queries: Tensor, documents: list[Tensor]) -> Tensor:
        """Of all ranks: log sum exp of a query's penalised scores with its own negatives, less that of its positive."""
        queries, *documents = self._normalized(queries, *documents)
        positive, *negatives = (torch.linalg.vecdot(queries, document) for document in documents)
        negative = torch.stack(negatives)
        scores = negative * self.scale + self.hardness_strength * negative.detach()
        return self._gathered(scores.logsumexp(0) - positive * self.scale)

    def _other_documents(self, queries: Tensor, documents: list[Tensor], row: Tensor) -> Tensor:
        """Of all ranks: log sum exp of a document's scores with those of other queries, less that of the positive.

        This softmax lacks its positive, so that it is no ``completion_loss``: some rows at a time, computed again in
        the backward.
        """
        queries, *documents = self._normalized(queries, *documents)
        candidates, ids = torch.cat(documents), row.repeat(len(documents))
        if self.gather_across_devices:
            candidates, ids = util.all_gather_with_grad(candidates), stack(ids).flatten()
        at_once = max(1, MAX_SCORES // len(candidates))
        parts = zip(documents[0].split(at_once), row.split(at_once), strict=True)
        own = [checkpoint(self._log_sum_exp, *part, candidates, ids, use_reentrant=False) for part in parts]
        return self._gathered(torch.cat(own) - torch.linalg.vecdot(queries, documents[0]) * self.scale)

    def _log_sum_exp(self, anchors: Tensor, row: Tensor, candidates: Tensor, ids: Tensor) -> Tensor:
        scores = anchors @ candidates.mT * self.scale
        # Half the lowest number: minus infinity would make the gradient of a row without others NaN.
        return scores.masked_fill(row[:, None] == ids, torch.finfo(scores.dtype).min / 2).logsumexp(1)

    def _normalized(self, *embeddings: Tensor) -> list[Tensor]:
        precise = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings]
        return [util.normalize_embeddings(x) for x in precise] if self.similarity_fct is util.cos_sim else precise

    def _gathered(self, own: Tensor) -> Tensor:
        return gather(own, mode="exact" if self.gather_across_devices else None)

    def _contrast(
        self, anchors: Tensor, candidates: list[Tensor], ids: Tensor | None,
        directions: Literal["both", "recovered_to_complete"] = "recovered_to_complete",
    ) -> Tensor:  # fmt: skip
        return completion_loss(
            anchors, torch.cat(candidates), temperature=1.0 / self.scale, directions=directions, reduction="none",
            same=ids, normalize=self.similarity_fct is util.cos_sim, eps=1e-12,
            gather="exact" if self.gather_across_devices else None,
        )  # fmt: skip


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """The package's ``CachedMultipleNegativesRankingLoss``, whose N x M similarities are not held in memory.

    The loss of the cached embeddings is evaluated at once, in tiles, and not by rows of ``mini_batch_size``.

    Args:
        model: the SentenceTransformer.
        scale: factor of the similarities, positive.
        similarity_fct: ``util.cos_sim`` or ``util.dot_score`` of the package.
        mini_batch_size: texts that are embedded at a time.
        mini_batch_num_tokens: tokens that are embedded at a time, in place of that.
        gather_across_devices: as for ``MultipleNegativesRankingLoss``.
        directions: what each row is contrasted with, as in the package.
        partition_mode: "joint" or "per_direction", as in the package.
        show_progress_bar: of the embedding.
        hardness_mode: None, or "hard_negatives"; the others are not supported.
        hardness_strength: as in the package.

    Attributes:
        loss: of the embeddings of all mini-batches.

    Raises:
        UserError: a ``similarity_fct`` or ``hardness_mode`` that is not supported. ValueError: what the package
            refuses.
    """

    loss: MultipleNegativesRankingLoss

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Similarity = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        show_progress_bar: bool = False,
        hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, directions,
            partition_mode, show_progress_bar, hardness_mode, hardness_strength,
        )  # fmt: skip
        self.loss = MultipleNegativesRankingLoss(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength,
        )  # fmt: skip

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of the embeddings of all mini-batches.

        Args:
            reps: of each column, the embeddings of each mini-batch.
            labels: not used, as in the package.
            with_backward: call backward(), too.

        Returns:
            Scalar, without gradient after ``with_backward``.
        """
        loss = self.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss
