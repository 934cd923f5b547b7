"""
The loss of a micro-batch in one pass: divergence, gradient and what is logged, from hidden states and output heads.

The tokens are projected in chunks, so memory is O(chunk * vocabulary) and not O(tokens * vocabulary). For each chunk

1. both heads project the hidden states: two products over the vocabulary (one on a GPU if the models share the head);
2. one elementwise pass gives each token's values, and replaces the student's logits by the gradient with respect to them;
3. two products give the gradients of the student's hidden states and head (one if the head is frozen).

The backward scales these gradients. So there are 4 products, and 3 with a frozen head. TRL's kernel projects again in its backward: it
has 6 and 5, and for the generalized JSD 8 and 7.

A head's gradient is a sum over tokens, so the weight of each token must be known here. It is, if it depends on masks. If it depends on
the divergences (of a whole rollout, say), use [`~trl_crisp.loss.divergence.per_token_divergence`], which is TRL's kernel.

Shape suffixes: N tokens in the loss, C tokens of a chunk, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from trl_crisp.loss import kernel_torch
from trl_crisp.loss.divergence import OutputHead, finite_bias, gathered, only_masked_by, refuse_infinite
from trl_crisp.loss.kernel_torch import TokenValues, Transform

# Tokens of a chunk on a CPU. Our choice: fewer are slower with a wide vocabulary, because each chunk adds to the whole gradient of the
# head, and more are not faster.
CPU_CHUNK_TOKENS = 256
# Logits of a chunk on a GPU, of each model. Our choice, so that the chunk takes no more memory than TRL's kernel: 690 tokens of
# Qwen3, 400 MiB in float32.
GPU_CHUNK_LOGITS = 100 * 2**20
# Rows of a head that are converted to float32 at once, if the device has no product of half-precision tensors into float32
CONVERTED_ROWS = 8192
# Float16 loses values below 6e-8. The gradient with respect to logits is at most some tens, so this factor keeps it finite
_FLOAT16_FACTOR = 256.0
# Weights that are all below it count as zero
_LEAST_UNIT = 1e-30


def fused_loss(
    student_hidden_NH: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_NH: torch.Tensor,
    teacher_head: OutputHead,
    token_ids_N: torch.Tensor,
    weights_N: torch.Tensor,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, TokenValues]:
    """
    Return the weighted sum of the tokens' divergences, and what the pass knows of each token.

    Gradients flow to the student's hidden states and head only. They are made here, in float32, and the backward scales and
    converts them, so they survive a loss scaler's factor in float16.

    Args:
        student_hidden_NH, teacher_hidden_NH: Last hidden states that predict the tokens in the loss.
        student_head, teacher_head, beta, temperature: See [`~trl_crisp.loss.divergence.per_token_divergence`]. Heads that ZeRO-3
            partitions are gathered.
        token_ids_N: The sampled tokens.
        weights_N: Of each token's divergence in the loss. They get no gradient.

    Returns:
        The loss, a scalar in float32, and the tokens' values, [N] in float32. The reverse KL is infinite if the teacher's bias masks
        a token that the student can generate. The log-probabilities are of the sampled tokens, at `temperature`.

    Raises:
        ValueError: If the divergence is infinite, as in [`~trl_crisp.loss.divergence.per_token_divergence`].
        RuntimeError: In a second backward through the same loss, because the first one uses the gradients up.
    """
    refuse_infinite(student_head, teacher_head, beta)
    with gathered(student_head, teacher_head):
        loss, *values = _FusedLoss.apply(
            student_hidden_NH,
            student_head.weight_VH,
            finite_bias(student_head.bias_V),
            teacher_hidden_NH,
            teacher_head.weight_VH,
            finite_bias(teacher_head.bias_V),
            token_ids_N,
            weights_N.float(),
            _Settings(
                Transform(student_head.logit_scale, student_head.softcap),
                Transform(teacher_head.logit_scale, teacher_head.softcap),
                temperature,
                beta,
                torch.is_grad_enabled(),
            ),
        )
        values = TokenValues(*values)
        masked_V = only_masked_by(teacher_head, student_head)
        if masked_V is not None and masked_V.any():
            values = values._replace(reverse_kl=torch.full_like(values.reverse_kl, torch.inf))
    return loss, values


def fold_for(device: torch.device) -> Callable[..., TokenValues]:
    """Return the elementwise pass for a device: Triton's on a GPU if Triton is installed, else plain torch's."""
    if device.type in ("cuda", "xpu") and find_spec("triton") is not None:
        from trl_crisp.loss import kernel_triton

        return kernel_triton.fold
    return kernel_torch.fold


class _Settings(NamedTuple):
    student_transform: Transform
    teacher_transform: Transform
    temperature: float
    beta: float
    needs_gradient: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_NH: torch.Tensor,
        student_weight_VH: torch.Tensor,
        student_bias_V: torch.Tensor | None,
        teacher_hidden_NH: torch.Tensor,
        teacher_weight_VH: torch.Tensor,
        teacher_bias_V: torch.Tensor | None,
        token_ids_N: torch.Tensor,
        weights_N: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, ...]:
        device = student_hidden_NH.device
        student = _Projection(student_hidden_NH, student_weight_VH, student_bias_V)
        # A shared head is converted once
        is_shared = teacher_weight_VH is student_weight_VH
        teacher = _Projection(teacher_hidden_NH, student.weight_VH if is_shared else teacher_weight_VH, teacher_bias_V)
        num_tokens, vocab_size = len(student_hidden_NH), len(student_weight_VH)

        inputs = (student_hidden_NH, student_weight_VH, student_bias_V)
        gradients = [
            # In float32, whatever the inputs are
            torch.zeros(tensor.shape, device=device)
            if settings.needs_gradient and needs and tensor is not None
            else None
            for tensor, needs in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        needs_gradient = any(gradient is not None for gradient in gradients)
        # What these gradients lack: a factor that all tokens have in common
        lacking = torch.full((), settings.student_transform.scale / settings.temperature, device=device)
        factors_N = None
        if student.is_half:
            # The gradient with respect to the logits is rounded to half precision, so the factors in it should be near 1
            unit = weights_N.abs().amax().clamp(min=_LEAST_UNIT) if num_tokens else lacking
            if student.dtype == torch.float16:
                unit = unit / _FLOAT16_FACTOR
            factors_N, lacking = weights_N / unit, lacking * unit

        chunk_tokens = min(_chunk_tokens(device, vocab_size), max(1, num_tokens))
        logits = torch.empty(2 * chunk_tokens * vocab_size, device=device)
        if student.is_half and needs_gradient:
            half_CV = torch.empty((chunk_tokens, vocab_size), device=device, dtype=student.dtype)
        values_N = TokenValues(*torch.empty((len(TokenValues._fields), num_tokens), device=device))
        fold = fold_for(device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, num_tokens, chunk_tokens):
                chunk = slice(start, min(start + chunk_tokens, num_tokens))
                size = chunk.stop - start
                logits_2CV = logits[: 2 * size * vocab_size].view(2, size, vocab_size)
                _project(student, teacher, chunk, logits_2CV)
                gradient_CV = half_CV[:size] if student.is_half and needs_gradient else logits_2CV[0]
                values = fold(
                    *logits_2CV,
                    token_ids_N[chunk],
                    settings.student_transform,
                    settings.teacher_transform,
                    settings.temperature,
                    settings.beta,
                    gradient_CV if needs_gradient else None,
                    None if factors_N is None else factors_N[chunk],
                )
                for value_N, value_C in zip(values_N, values, strict=True):
                    value_N[chunk] = value_C
                if needs_gradient:
                    outer_C = weights_N[chunk] if factors_N is None else None
                    _add_gradients(gradient_CV, outer_C, student, chunk, *gradients)

        # No saved tensors: autograd takes a gradient over as it is only if nobody else holds it
        ctx.gradients, ctx.lacking = gradients, lacking
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values_N)
        return (weights_N * values_N.divergence).sum(), *values_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward went through this loss, and the first one used its gradients up. Compute the loss again; "
                "retain_graph=True does not keep them."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_loss.float() * ctx.lacking
        scaled = []
        for dtype in ctx.dtypes:
            gradient = gradients.pop(0)
            scaled.append(None if gradient is None else gradient.mul_(factor).to(dtype))
        return (*scaled, *(None,) * 6)


class _Projection:
    """One side's hidden states and head, in the dtypes that their products take. The products' results are float32."""

    def __init__(self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        device_type = hidden_NH.device.type
        # As TRL's kernel does, which follows the autocast around it
        is_autocast = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type) if is_autocast else hidden_NH.dtype
        self.is_half = _multiplies_halves(device_type) and self.dtype in (torch.float16, torch.bfloat16)
        self.hidden_NH = hidden_NH.to(self.dtype) if self.is_half else hidden_NH.to(self.dtype).float()
        self.weight_VH = weight_VH.to(self.dtype) if self.is_half else weight_VH
        self.bias_V = bias_V

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the weight's rows for the products: all at once, unless they have to be converted."""
        if self.is_half or self.weight_VH.dtype == self.dtype == torch.float32:
            yield slice(None), self.weight_VH
            return
        for start in range(0, len(self.weight_VH), CONVERTED_ROWS):
            rows = slice(start, start + CONVERTED_ROWS)
            yield rows, self.weight_VH[rows].to(self.dtype).float()


def _multiplies_halves(device_type: str) -> bool:
    # Other devices have no product of half-precision tensors with a float32 result
    return device_type == "cuda"


def _chunk_tokens(device: torch.device, vocab_size: int) -> int:
    return CPU_CHUNK_TOKENS if device.type == "cpu" else max(1, GPU_CHUNK_LOGITS // vocab_size)


def _project(student: _Projection, teacher: _Projection, chunk: slice, logits_2CV: torch.Tensor) -> None:
    hidden_CH = [side.hidden_NH[chunk] for side in (student, teacher)]
    if student.is_half and student.weight_VH is teacher.weight_VH:
        # On a CPU one product is not faster, and its rows can differ in the last bit although their inputs are equal
        _multiply(torch.cat(hidden_CH), student.weight_VH.t(), logits_2CV.flatten(0, 1))
    else:
        for side, side_hidden_CH, logits_CV in zip((student, teacher), hidden_CH, logits_2CV, strict=True):
            for rows, tile in side.tiles():
                _multiply(side_hidden_CH, tile.t(), logits_CV[:, rows])
    for side, logits_CV in zip((student, teacher), logits_2CV, strict=True):
        if side.bias_V is not None:
            logits_CV.add_(side.bias_V)


def _add_gradients(
    gradient_CV: torch.Tensor,
    weights_C: torch.Tensor | None,
    student: _Projection,
    chunk: slice,
    grad_hidden_NH: torch.Tensor | None,
    grad_weight_VH: torch.Tensor | None,
    grad_bias_V: torch.Tensor | None,
) -> None:
    # Weights that are not in the gradient yet: it is cheaper to apply them to H numbers of a token than to V
    hidden_CH = student.hidden_NH[chunk] if weights_C is None else student.hidden_NH[chunk] * weights_C[:, None]
    for rows, tile in student.tiles():
        if grad_hidden_NH is not None:
            _add_product(grad_hidden_NH[chunk], gradient_CV[:, rows], tile)
        if grad_weight_VH is not None:
            _add_product(grad_weight_VH[rows], gradient_CV[:, rows].t(), hidden_CH)
    if grad_hidden_NH is not None and weights_C is not None:
        grad_hidden_NH[chunk].mul_(weights_C[:, None])
    if grad_bias_V is not None:
        if weights_C is None:
            grad_bias_V += gradient_CV.sum(0, dtype=torch.float32)
        else:
            grad_bias_V.addmv_(gradient_CV.t(), weights_C)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
