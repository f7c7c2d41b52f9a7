"""Logistic regression at the size of an evaluation: L-BFGS on preconditioned weights, on the CPU or a GPU.

The objective is scikit-learn's, Σ s·loss·C + ½‖W − W₀‖² with a free intercept, so that the solution is the same. What
differs is the way there. The optimiser works on U with W = U·L⁻¹, where L·Lᵀ is the Hessian with every probability at
its mean (Nocedal & Wright 2006, section 5.1): correlated features, such as an encoder's, then take tens of iterations
in place of hundreds. Features stay in float32 where they are many, centred, so that a large mean costs no digits of
their differences; losses and gradients are summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

_BLOCK = 16_384  # rows whose logits are held at a time
_DOUBLE = 2**22  # entries of a feature matrix up to which float64 costs next to nothing
_GRAM_ROWS = 16_384  # rows that the preconditioner rests on: it need not be exact
_MEMORY = 20  # pairs of vectors that L-BFGS keeps


@dataclass(frozen=True)
class Scaling:
    """An affine map of features: (x − centre) / scale.

    Args:
        centre, scale: float64 [d].
    """

    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def standard(cls, x: np.ndarray) -> Scaling:
        """To mean 0 and variance 1; a constant feature keeps its scale."""
        x = x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float64)
        total, square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for start in range(0, len(x), _BLOCK):
            total += x[start : start + _BLOCK].sum(axis=0, dtype=np.float64)
        centre = total / len(x)
        for start in range(0, len(x), _BLOCK):
            away = x[start : start + _BLOCK] - centre.astype(x.dtype)
            square += np.einsum("ij,ij->j", away, away)
        scale = np.sqrt(square / len(x))
        constant = scale <= 10 * np.finfo(x.dtype).eps * np.abs(centre)
        return cls(centre, np.where(constant, 1.0, scale))

    @classmethod
    def none(cls, d: int) -> Scaling:
        """Features as they are."""
        return cls(np.zeros(d), np.ones(d))


@dataclass(frozen=True)
class Solution:
    """Weights of a logistic regression.

    Args:
        weights: [K, d], of the scaled features; [1, d] for two classes, of which the second has the positive logit.
        intercept: [K], or [1].
        converged: Whether the optimiser reached its tolerance.
        iterations: Number of iterations.
    """

    weights: np.ndarray
    intercept: np.ndarray
    converged: bool
    iterations: int


class Problem:
    """A logistic regression on some rows, to be solved for any C.

    Args:
        x: Features, [N, d]. float32 is kept where there are many.
        codes: Class of each row, 0 to K − 1, [N].
        weights: Weight of each row, [N].
        scaling: Applied to the features.
        device: Torch device.
        gram: What the preconditioner rests on, such as the ``gram`` of another problem with similar features.

    Raises:
        ValueError: A feature is not finite.
    """

    def __init__(
        self,
        x: np.ndarray,
        codes: np.ndarray,
        weights: np.ndarray,
        scaling: Scaling,
        device: str = "cpu",
        gram: np.ndarray | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float64 if x.size <= _DOUBLE else torch.float32
        self.x = torch.as_tensor(np.ascontiguousarray(x)).to(self.device, self.dtype)
        self.codes = torch.as_tensor(np.asarray(codes, np.int64)).to(self.device)
        self.total = float(weights.sum())
        self.weights = torch.as_tensor(np.asarray(weights / self.total, np.float64)).to(self.device)
        self.scaling, self.n_classes = scaling, max(int(codes.max()) + 1, 2)
        # The free intercept makes up for any shift of the features; about their mean it is independent of the weights.
        # The shift is a number of the features' own precision, so that what is subtracted is known exactly.
        shift = self._mean().to(self.dtype)
        self.shift: np.ndarray = shift.double().cpu().numpy()
        if not np.isfinite(self.shift).all():
            raise ValueError("features must be finite numbers")
        self.x = self.x - shift
        self.gram = self._gram() if gram is None else gram

    def _mean(self) -> torch.Tensor:
        total = torch.zeros(self.x.shape[1], dtype=torch.float64, device=self.device)
        for start in range(0, len(self.x), _BLOCK):
            part = slice(start, start + _BLOCK)
            total += (self.weights[part].to(self.dtype) @ self.x[part]).double()
        return total

    def _gram(self) -> np.ndarray:
        """Σ s·x·xᵀ / Σ s of the scaled and centred features, [d, d], of at most 16,384 rows."""
        rows = slice(None, None, max(1, -(-len(self.x) // _GRAM_ROWS)))
        scale = torch.as_tensor(self.scaling.scale, dtype=self.dtype, device=self.device)
        s = self.weights[rows] / self.weights[rows].sum()
        x = self.x[rows] / scale * s.sqrt().to(self.dtype)[:, None]
        gram: np.ndarray = (x.T @ x).double().cpu().numpy()
        return gram

    def solve(
        self,
        regularisation: float,
        max_iter: int,
        start: np.ndarray | None = None,
        towards: np.ndarray | None = None,
    ) -> Solution:
        """Minimise Σ s·loss·C + ½‖W − W₀‖².

        Args:
            regularisation: C.
            max_iter: Iterations at most.
            start: Weights to start from, the intercept last, [K or 1, d + 1]; by default ``towards``, or 0.
            towards: W₀ likewise, whose intercept is not used; by default 0.
        """
        k, d = (1 if self.n_classes == 2 else self.n_classes), self.x.shape[1]
        penalty = 1.0 / (regularisation * self.total)
        target = np.zeros((k, d)) if towards is None else towards[:, :-1]
        begin = start if start is not None else towards if towards is not None else np.zeros((k, d + 1))
        curvature = (1 - 1 / self.n_classes) / self.n_classes
        # Of dependent features the Gram matrix, in single precision, may have eigenvalues a little below 0.
        rounding = 4 * float(np.finfo(np.float32).eps) * float(np.trace(self.gram))
        hessian = curvature * self.gram + (curvature * rounding + penalty) * np.eye(d)
        lower = torch.linalg.cholesky(torch.as_tensor(hessian))
        inverse = torch.linalg.solve_triangular(lower, torch.eye(d, dtype=torch.float64), upper=False).numpy()
        # The intercept's own curvature is that of a feature that is always 1.
        unit = curvature**-0.5
        moved = (self.shift - self.scaling.centre) / self.scaling.scale
        intercept = begin[:, -1] + begin[:, :-1] @ moved
        free = np.column_stack([begin[:, :-1] @ lower.numpy(), intercept / unit])

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            u = flat.reshape(k, d + 1)
            w, b = u[:, :-1] @ inverse, u[:, -1] * unit
            loss, slope, slope_b = self._loss(w / self.scaling.scale, b)
            away = w - target
            gradient = (slope / self.scaling.scale + penalty * away) @ inverse.T
            value = loss + 0.5 * penalty * float((away**2).sum())
            return value, np.column_stack([gradient, slope_b * unit]).ravel()

        exact = self.dtype == torch.float64
        options = {"maxiter": max_iter, "maxfun": 10 * max_iter, "maxcor": _MEMORY, "gtol": 1e-7 if exact else 1e-5}
        result = minimize(
            objective, free.ravel(), jac=True, method="L-BFGS-B", options=options | {"ftol": 1e-13 if exact else 1e-10}
        )
        u = result.x.reshape(k, d + 1)
        w = u[:, :-1] @ inverse
        # Status 1 is a limit reached; a line search that finds nothing better (2) has arrived as far as rounding goes.
        return Solution(w, u[:, -1] * unit - w @ moved, result.status != 1, int(result.nit))

    def _loss(self, a: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Weighted mean loss with logits x·aᵀ + b of the centred features, and its gradients by a and b."""
        rows = torch.as_tensor(a, dtype=self.dtype, device=self.device)
        offset = torch.as_tensor(b, dtype=torch.float64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        slope = torch.zeros(a.shape, dtype=torch.float64, device=self.device)
        slope_b = torch.zeros(len(b), dtype=torch.float64, device=self.device)
        for start in range(0, len(self.x), _BLOCK):
            part = slice(start, start + _BLOCK)
            x, code, s = self.x[part], self.codes[part], self.weights[part]
            logits = (x @ rows.T).double() + offset
            if len(b) == 1:
                sign = 1.0 - 2.0 * code
                margin = sign * logits[:, 0]
                loss += s @ torch.nn.functional.softplus(margin, threshold=700)
                residual = (s * sign * torch.sigmoid(margin))[:, None]
            else:
                logs = torch.log_softmax(logits, dim=1)
                loss -= s @ logs.gather(1, code[:, None])[:, 0]
                residual = logs.exp()
                residual[torch.arange(len(code), device=self.device), code] -= 1.0
                residual *= s[:, None]
            slope += (residual.to(self.dtype).T @ x).double()
            slope_b += residual.sum(dim=0)
        return float(loss), slope.cpu().numpy(), slope_b.cpu().numpy()
