"""Names of GPUs: text to `GPURequest` and back. Pure and table-driven; refuses every spelling it does not know.

    a100  8xh100  a100x8  a100-80gb.sxm.4x  h100-80gb.pcie.1x  it_fK7Cx6TVhOK5ZfXT  cpu

Case does not matter, except in `it_…`, which is a provider's own id and passes through unread. A bare name
means one GPU, and eight where a provider only rents whole machines: `h100` is `8xh100`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from flow_core.errors import ValidationError, close_names

MAX_COUNT = 64
"""The most GPUs that one machine may be asked for."""


class _Model(NamedTuple):
    memories_gb: tuple[int, ...]  # the usual one first
    default_count: int = 1


_MODELS = {
    "a10": _Model((24,)),
    "a100": _Model((80, 40)),
    "a10g": _Model((24,)),
    "a16": _Model((16,)),
    "a30": _Model((24,)),
    "a40": _Model((48,)),
    "b200": _Model((180, 192)),
    "b300": _Model((288,)),
    "gb200": _Model((186, 192)),
    "gh200": _Model((96, 144)),
    "h100": _Model((80, 94, 96), default_count=8),
    "h200": _Model((141,)),
    "l4": _Model((24,)),
    "l40": _Model((48,)),
    "l40s": _Model((48,)),
    "p100": _Model((16, 12)),
    "p4": _Model((8,)),
    "rtx3090": _Model((24,)),
    "rtx4090": _Model((24,)),
    "rtx5090": _Model((32,)),
    "rtx6000": _Model((48, 24, 96)),
    "rtxa6000": _Model((48,)),
    "t4": _Model((16,)),
    "v100": _Model((16, 32)),
}
_FORM_FACTORS = ("sxm", "sxm2", "sxm3", "sxm4", "sxm5", "pcie", "nvl")

_NAMES = "|".join(sorted(_MODELS, key=len, reverse=True))
_REQUEST = re.compile(
    rf"(?:(?P<before>[0-9]+)x)?(?P<gpu>{_NAMES})(?:x(?P<after>[0-9]+))?"
    r"(?:-(?P<memory>[0-9]+)gb)?(?:\.(?P<form>[a-z]+[0-9]?))?(?:\.(?P<last>[0-9]+)x)?"
)
_INSTANCE_ID = re.compile(r"it_[A-Za-z0-9_-]+")
_INSIDE = re.compile(
    rf"(?<![a-z0-9])(?:(?<!\.)(?P<before>[0-9]+)\s*[x*:]\s*)?(?P<gpu>{_NAMES})(?:\s*[x*:]\s*(?P<after>[0-9]+))?(?![0-9a-z])"
)


@dataclass(frozen=True)
class GPURequest:
    """What one machine must have. Made by `parse`; equal requests are equal however they were spelled.

    `count` is the number of GPUs per machine (0 for `cpu`; 1 for `it_…`, whose provider knows the real one).
    `memory_gb` and `form_factor` are None where the text did not ask for them, `gpu` is None for `cpu` and
    `it_…`. `text` is what the user wrote.
    """

    count: int
    gpu: str | None = None
    memory_gb: int | None = None
    form_factor: str | None = None
    instance_id: str | None = None
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        """The canonical spelling; parsing it gives an equal request."""
        if self.instance_id is not None:
            return self.instance_id
        if self.gpu is None:
            return "cpu"
        if self.memory_gb is not None or self.form_factor is not None:
            memory = "" if self.memory_gb is None else f"-{self.memory_gb}gb"
            form = "" if self.form_factor is None else f".{self.form_factor}"
            return f"{self.gpu}{memory}{form}.{self.count}x"
        if self.count == 1 and _MODELS[self.gpu].default_count == 1:
            return self.gpu
        return f"{self.count}x{self.gpu}"

    @property
    def usual_memory_gb(self) -> int | None:
        """Memory of one GPU: what was asked for, else what this model usually has; None where unknown."""
        if self.memory_gb is not None or self.gpu is None:
            return self.memory_gb
        return _MODELS[self.gpu].memories_gb[0]

    def describe(self) -> str:
        """For messages: `8 x H100 80GB (from 'h100')`, so that nobody is surprised by a default."""
        if self.instance_id is not None:
            return f"instance type {self.instance_id}"
        if self.gpu is None:
            return "no GPU"
        form = f" {self.form_factor.upper()}" if self.form_factor else ""
        origin = f" (from {self.text!r})" if self.text and self.text.lower() != str(self) else ""
        return f"{self.count} x {self.gpu.upper()} {self.usual_memory_gb}GB{form}{origin}"


def known_gpus() -> tuple[str, ...]:
    """Every GPU model that `parse` knows, sorted."""
    return tuple(_MODELS)


def parse(name: str) -> GPURequest:
    """Read the name of an instance type.

    Raises:
        ValidationError: the name is not one of the documented spellings. The suggestions show the right one.
    """
    if not isinstance(name, str):
        raise ValidationError(
            f"An instance type is text, not {name!r}.", suggestions=["Write it like 'a100' or '8xh100'."]
        )
    text = name.strip()
    if _INSTANCE_ID.fullmatch(text):
        return GPURequest(count=1, instance_id=text, text=text)
    lower = text.lower()
    if lower == "cpu":
        return GPURequest(count=0, text=text)
    match = _REQUEST.fullmatch(lower)
    if match is None:
        raise ValidationError(
            f"Instance type {name[:80]!r} is not known.", suggestions=_right_spelling(lower)
        )
    gpu = match["gpu"]
    return GPURequest(
        count=_count(name, match),
        gpu=gpu,
        memory_gb=_memory(name, gpu, match["memory"]),
        form_factor=_form_factor(name, match["form"]),
        text=text,
    )


def _count(name: str, match: re.Match[str]) -> int:
    gpu = match["gpu"]
    given = [group for group in match.group("before", "after", "last") if group is not None]
    if len(given) > 1:
        raise ValidationError(
            f"Instance type {name!r} says twice how many GPUs it wants.",
            suggestions=[f"Write '{given[0]}x{gpu}' or '{given[-1]}x{gpu}'."],
        )
    count = int(given[0][:9]) if given else _MODELS[gpu].default_count
    if count == 0:
        raise ValidationError(
            f"Instance type {name!r} asks for no GPU at all.",
            suggestions=[f"Write 'cpu' for a machine without a GPU, or '{gpu}' for one with."],
        )
    if count > MAX_COUNT:
        raise ValidationError(
            f"Instance type {name!r} asks for more than {MAX_COUNT} GPUs in one machine.",
            suggestions=[f"Ask for several machines: instance_type='8x{gpu}', num_instances=…"],
        )
    return count


def _memory(name: str, gpu: str, digits: str | None) -> int | None:
    if digits is None:
        return None
    known = _MODELS[gpu].memories_gb
    memory = int(digits[:9])
    if memory not in known:
        raise ValidationError(
            f"Instance type {name!r}: there is no {gpu.upper()} with {memory} GB.",
            suggestions=["Write " + " or ".join(f"'{gpu}-{known_gb}gb'" for known_gb in sorted(known)) + "."],
        )
    return memory


def _form_factor(name: str, form: str | None) -> str | None:
    if form is not None and form not in _FORM_FACTORS:
        raise ValidationError(
            f"Instance type {name!r}: {form!r} is not a form factor.",
            suggestions=[f"Known are {', '.join(_FORM_FACTORS)}."],
        )
    return form


def _right_spelling(lower: str) -> list[str]:
    """One suggestion for a name that could not be read: what it looks like, else what there is."""
    squeezed = re.sub(r"\s+", "", lower)
    inside = _INSIDE.search(lower)
    if squeezed != lower and (squeezed == "cpu" or _REQUEST.fullmatch(squeezed)):
        return [f"Write {squeezed!r}."]
    if inside:
        count, gpu = inside["before"] or inside["after"], inside["gpu"]
        return [f"Write '{count}x{gpu}'." if count else f"Write {gpu!r}."]
    if lower in ("", "none", "no", "0"):
        return ["Write 'cpu' for a machine without a GPU."]
    near = close_names(lower, [*_MODELS, "cpu"])
    if near:
        return [f"Did you mean {' or '.join(repr(option) for option in near)}?"]
    return [f"Write one of cpu, {', '.join(_MODELS)}, with a count in front: '8xh100'."]
