"""Every estimator by its definition.

Kronecker rules give ``(scale, G, A)`` for one group; `dense` and `block_dense` make matrices of them.
"""

import torch

from tests.support.oracles.one_layer import patches


def dense(scale, G, A):
    return scale * torch.kron(G.contiguous(), A.contiguous())


def block_dense(rule, data):
    """The block (q·p, q·p) by a rule for one group: block diagonal over the groups."""
    return torch.block_diag(*(dense(*rule(group)) for group in data.groups))


def exact_block(X):
    """F = 1/N Σ vec(X) vec(X)ᵀ."""
    flat = X.flatten(2)
    return torch.einsum("nvi,nvj->ij", flat, flat) / len(X)


def diagonal(X):
    return torch.diag(X.square().sum((0, 1)).reshape(-1) / len(X))


def kfac_expand(group):
    n, t = group.a.shape[:2]
    A = torch.einsum("nti,ntj->ij", group.a, group.a) / n
    G = torch.einsum("nvti,nvtj->ij", group.g, group.g) / (n * t)
    return 1.0, G, A


def kfac_reduce(group):
    """First average the inputs and sum the gradients over the shared axis; convolutions stay with KFC's rule."""
    if group.convolution is not None:
        return kfac_expand(group)
    a, g = group.a.mean(1), group.g.sum(2)
    return 1.0, torch.einsum("nvi,nvj->ij", g, g) / len(a), a.T @ a / len(a)


def sua(group):
    """Spatially uncorrelated activations and white derivatives (KFC Theorem 4); zero padding only."""
    n, _, t, q = group.g.shape
    scale = group.g.square().sum() / (n * q * t)
    A = kfac_expand(group)[2] if group.convolution is None else sua_activations(group.convolution, group.images)
    return scale, torch.eye(q, dtype=torch.float64), A


def sua_activations(module, images):
    """Entry by entry; images is (N, channels, *size), of one group."""
    assert module.padding_mode == "zeros"
    channels = images.shape[1]
    pixels = images.flatten(2)
    mean = pixels.mean((0, 2))
    moment = torch.einsum("njs,nks->jk", pixels, pixels) / (pixels.shape[0] * pixels.shape[2])
    # The patches of an image of ones tell which taps fall inside at which position.
    inside = patches(module, torch.ones_like(images[:1]))
    positions, bias = len(inside), module.bias is not None
    taps = (inside.shape[1] - bias) // channels
    inside = inside[:, :taps]
    A = torch.zeros(channels * taps + bias, channels * taps + bias, dtype=torch.float64)
    for j in range(channels):
        for k in range(channels):
            for d in range(taps):
                for e in range(taps):
                    both = (inside[:, d] * inside[:, e]).sum()
                    A[j * taps + d, k * taps + e] = both * (moment[j, k] if d == e else mean[j] * mean[k])
        if bias:
            A[j * taps : (j + 1) * taps, -1] = A[-1, j * taps : (j + 1) * taps] = inside.sum(0) * mean[j]
    if bias:
        A[-1, -1] = positions
    return A


def unit_trace(matrix):
    """Zeros stay zeros."""
    return matrix / matrix.trace() if matrix.trace() > 0 else matrix


def tkfac_exact(group):
    A = torch.einsum("nvij,nvik->jk", group.X, group.X)
    G = torch.einsum("nvij,nvkj->ik", group.X, group.X)
    return group.X.square().sum() / len(group.X), unit_trace(G), unit_trace(A)


def tkfac_uncorrelated(group):
    """Position by position, as if the positions' gradients did not correlate (TKFAC Eq. 4.13)."""
    a2, g2 = group.a.square().sum(2), group.g.square().sum(3)
    A = torch.einsum("nvt,nti,ntj->ij", g2, group.a, group.a)
    G = torch.einsum("nt,nvti,nvtj->ij", a2, group.g, group.g)
    scale = torch.einsum("nvt,nt->", g2, a2) / len(group.a)
    return scale, unit_trace(G), unit_trace(A)


def rearranged(F_dense, q, p):
    """Van Loan: a Kronecker product G ⊗ A becomes vec(G) vec(A)ᵀ."""
    return F_dense.reshape(q, p, q, p).permute(0, 2, 1, 3).reshape(q * q, p * p)


def best_rank_one(F_dense, q, p):
    """(scale, G, A) with unit norms and traces not negative: the nearest Kronecker product."""
    U, S, V = torch.linalg.svd(rearranged(F_dense, q, p), full_matrices=False)
    G, A = U[:, 0].reshape(q, q), V[0].reshape(p, p)
    sign = -1.0 if A.trace() < 0 else 1.0
    return S[0], sign * G, sign * A


def kfoc_full(group):
    return best_rank_one(exact_block(group.X), *group.X.shape[2:])


def kfoc_running(group, batches):
    """Batches are index lists: the best rank one of (what there is + the best rank one of the batch), in order."""
    q, p = group.X.shape[2:]
    total = torch.zeros(q * p, q * p, dtype=torch.float64)
    for batch in batches:
        X = group.X[batch]
        total = total + dense(*best_rank_one(len(X) * exact_block(X), q, p))
        total = dense(*best_rank_one(total, q, p))
    scale, G, A = best_rank_one(total, q, p)
    return scale / len(group.X), G, A


def kfoc_approx(group, batches, unit_factor="gradient", weights=None):
    """K-FOC_approx: L (of unit norm, of the gradients) and R (with the size) are averaged each on its own.

    Batches without a gradient have no direction L. With ``unit_factor="activation"`` L is of the activations.
    """
    weights = [1.0] * len(batches) if weights is None else weights
    L, R, count = 0, 0, 0.0
    for batch, weight in zip(batches, weights, strict=True):
        X = group.X[batch]
        if X.any():
            scale, G, A = best_rank_one(len(batch) * exact_block(X), *X.shape[2:])
            unit, sized = (G, scale * A) if unit_factor == "gradient" else (A, scale * G)
            L, R, count = L + weight * unit, R + weight * sized, count + weight
    total = sum(weight * len(batch) for batch, weight in zip(batches, weights, strict=True))
    q, p = group.X.shape[2:]
    if count == 0:
        return 0.0, torch.zeros(q, q, dtype=torch.float64), torch.zeros(p, p, dtype=torch.float64)
    return (1 / total, L / count, R) if unit_factor == "gradient" else (1 / total, R, L / count)


def kfoc_running_sum(group, batches, rank, decay=1.0):
    """A running sum of more than one term, for weights used once, as a dense operator that is cut by its SVD.

    Up to ``4 · rank`` examples wait before they are merged; of a larger batch the best rank one is merged at once.
    """
    q, p = group.X.shape[2:]

    def cut(R, rank):
        U, S, V = torch.linalg.svd(R, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ V[:rank]

    total, waiting, weight = torch.zeros(q * q, p * p, dtype=torch.float64), [], 0.0
    for batch in batches:
        total, waiting, weight = decay * total, [decay * one for one in waiting], decay * weight + len(batch)
        ones = [rearranged(exact_block(X[None]), q, p) for X in group.X[batch]]
        if len(batch) > 4 * rank:
            total = cut(total + cut(sum(ones), 1), rank)
            continue
        if len(waiting) + len(batch) > 4 * rank:
            total, waiting = cut(total + sum(waiting), rank), []
        waiting += ones
    last = cut(total + sum(waiting), 1) / weight
    return last.view(q, q, p, p).permute(0, 2, 1, 3).reshape(q * p, q * p)


def kfoc_published(group, batches, max_iter=1000, tol=1e-14):
    """K-FOC_running to the letter: Algorithm 2 for each batch, Algorithm 1 for the running average.

    For batches of one size, because the published average weighs all batches the same.
    """
    q = group.X.shape[2]

    if not group.X.any():
        return kfoc_running(group, batches)

    def power_method(backward, forward):
        L = torch.randn(q, q, dtype=torch.float64)
        L = L / torch.linalg.norm(L)
        for _ in range(max_iter):
            R = backward(L)
            new = forward(R / torch.linalg.norm(R))
            new = new / torch.linalg.norm(new)
            change, L = torch.linalg.norm(new - L), new
            if change < tol:
                break
        return L, backward(L)

    running = None
    for count, batch in enumerate(batches, start=1):
        Xs = group.X[batch].flatten(0, 1)
        of_batch = power_method(
            lambda L, Xs=Xs: sum(X.T @ L @ X for X in Xs) / len(batch),  # noqa: B023
            lambda R, Xs=Xs: sum(X @ R @ X.T for X in Xs) / len(batch),  # noqa: B023
        )
        if running is None:
            running = of_batch
            continue
        pairs = [(running[0], (count - 1) / count * running[1]), (of_batch[0], of_batch[1] / count)]
        running = power_method(
            lambda L, pairs=pairs: sum((left * L).sum() * right for left, right in pairs),
            lambda R, pairs=pairs: sum((right * R).sum() * left for left, right in pairs),
        )
    return 1.0, *running


def ekfac(group, G, A):
    """The dense block with the exact second moments in the eigenbasis of two factors."""
    Q = torch.kron(torch.linalg.eigh(G)[1].contiguous(), torch.linalg.eigh(A)[1].contiguous())
    rotated = group.X.flatten(2) @ Q
    return Q @ torch.diag(rotated.square().sum((0, 1)) / len(rotated)) @ Q.T


def error(approximation, exact):
    """‖F̂ − F‖_F / ‖F‖_F."""
    return float(torch.linalg.norm(approximation - exact) / torch.linalg.norm(exact))
