"""The norm of the gradient of a pair's own loss, with respect to all parameters of both heads (GraNd, arXiv 2107.07075).

It needs no backward pass for each pair, because Pos_n depends on row n and column n of S only. With r_j = dPos_n / dS_nj and
c_i = dPos_n / dS_in (`Loss.pair_cotangents`), cosines C_ij = <u_i, v_j> and a_j = x_j / |z_j|, the gradient with respect to the
image head is

    G_n = s [ alpha_n (x) u_n - sum_j m_j a_j (x) v_j + a_n (x) w_n ]
    alpha_n = sum_j r_j a_j,   m_j = r_j C_nj,   w_n = sum_i c_i (u_i - C_in v_n)

Its squared norm is a sum of products of B x B matrices: the inner products of the a_j and of the embeddings. For the text head,
images and texts change places. If log s or the bias is a parameter, it adds (sum_ij dPos_n/dS_ij S'_ij)^2, with S' = s C for
log s and S' = 1 for the bias.
"""

from torch import Tensor

from ecif.columns.contract import HeldOutPairs, PairScore
from ecif.heads import Embedded, Heads, embed, logits
from ecif.losses import Loss


class GradientNorm(PairScore, name="gradient_norm"):
    """Mean of |grad Pos_n| over the batches and the seeds."""

    good = "low"
    unit = "nats per unit of the parameters"
    says = "Norm of the gradient of the pair's loss in the heads fitted without the pair's fold, mean over batches and seeds."
    of_fold = True

    def values(self, pairs: HeldOutPairs) -> Tensor:
        """[N] norm of every pair."""

        def norms(heads: Heads) -> Tensor:
            embedded = embed(heads, pairs.images, pairs.texts)
            return pairs.mean_over_batches(lambda rows: pair_gradient_norms(heads, embedded.take(rows), pairs.loss))

        return pairs.mean_over_seeds(norms)


def pair_gradient_norms(heads: Heads, batch: Embedded, loss: Loss) -> Tensor:
    """[B] 2-norm over all parameters of the heads of the gradient of every Pos_n.

    Args:
        heads: where the gradient is taken.
        batch: B pairs under these heads.
        loss: the loss that defines Pos_n; a loss of two towers.
    """
    rows, columns = loss.pair_cotangents(logits(heads, batch))
    cosine = batch.u @ batch.v.T
    image = _squared_norms(batch.images / batch.image_norm, batch.v, batch.u, rows, columns, cosine)
    text = _squared_norms(batch.texts / batch.text_norm, batch.u, batch.v, columns, rows, cosine.T)
    squared = heads.logit_scale**2 * (image + text)
    if heads.train_logit_scale:
        squared = squared + (heads.logit_scale * (rows * cosine + columns * cosine.T).sum(1)) ** 2
    if heads.train_logit_bias:
        squared = squared + (rows + columns).sum(1) ** 2
    return squared.clamp_min(0).sqrt()


def _squared_norms(a: Tensor, v: Tensor, u: Tensor, rows: Tensor, columns: Tensor, cosine: Tensor) -> Tensor:
    """|G_n / s|^2 [B] for one head.

    Args:
        a: [B, d_x] features of the head, divided by the norm of their projections z.
        v: [B, d] unit embeddings of the head.
        u: [B, d] unit embeddings of the other head.
        rows: r [n, j], with embedding j of this head.
        columns: c [n, i], with embedding i of the other head.
        cosine: [n, j] of u_n with v_j.
    """
    gram, weighted = a @ a.T, rows * cosine
    alpha = rows @ gram  # [n, j] <alpha_n, a_j>
    w = columns @ u - (columns * cosine.T).sum(1, keepdim=True) * v
    squares = (
        (alpha * rows).sum(1) * (u * u).sum(1)
        + ((weighted @ (gram * (v @ v.T))) * weighted).sum(1)
        + gram.diagonal() * (w * w).sum(1)
    )
    mixed = alpha.diagonal() * (u * w).sum(1) - (weighted * alpha * cosine).sum(1) - (weighted * gram * (w @ v.T)).sum(1)
    return squares + 2 * mixed
