"""Typed configuration of the engine. Every derived value is a property; every bad value is a one-line UserError."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tide_ray.types import UserError, is_integer

DTYPES = ("auto", "float32", "bfloat16", "float16")
POLICIES = ("auto", "full", "static", "router", "confidence", "capacity", "posthoc")
KV_POLICIES = ("fitted", "copy", "deferred", "full")
MEASURES = ("probability", "margin", "entropy")
LOSSES = ("tokens", "answers", "task")
"""What a certificate may bound."""
EXITS_WHEN = ("pays", "always")
MODES = ("exits", "verified")
COMPILE = ("auto", "off")
CUDA_GRAPHS = ("auto", "off")
ASYNC_SCHEDULING = ("auto", "on", "off")
DEFAULT_EXIT_ERROR = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs one model.

    Args:
        dtype: weights and activations: ``auto`` (bfloat16 on a GPU or a CPU with bfloat16 instructions, else float32),
            ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto`` (cuda when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run modelling code that comes with the weights. Off unless asked for.
        max_num_seqs: most resident sequences; None plans it from memory and ``max_model_len``, up to the knee of
            throughput.
        max_model_len: most tokens of prompt plus answer; None takes the model's own limit.
        max_num_batched_tokens: most rows of one step; a longer prompt is prefilled in chunks.
        kv_memory_fraction: share of the free memory that K/V pages may take.
        page_size: tokens per K/V page.
        prefix_caching: prompts that begin alike share the K/V pages of their beginning, which is computed once. With
            ``prefill_share`` a shared page keeps the choice of tokens that stop made for the prompt that came first.
        policy: ``auto`` (``router`` with ``exits``, else ``full``); ``full``; ``static``: every token runs the same
            fixed set of layers; with ``exits``: ``router`` (calibrated gates), ``confidence`` (of the exit head through
            the LM head), ``capacity`` (a fixed share of rows goes deeper), ``posthoc`` (all layers run, states are
            selected, as the TIDE paper measures it).
        exits: folder of a router checkpoint.
        mode: ``exits``: a token that exits is part of the answer; ``verified``: it is a draft until full depth confirms
            it, so that answers are full depth's.
        exit_threshold: score from which a token exits, at every boundary; None takes the checkpoint's for
            ``exit_error``.
        exit_error: error among exiting tokens that the checkpoint's thresholds were calibrated for; None means 0.02.
        max_disagreement: take the thresholds that the checkpoint has a certificate for (``tide-ray certify``): the one
            with the largest epsilon that is not above this. Requests that it would not hold for are rejected. Prompts
            whose tokens may stop share no K/V pages then, as a shared page keeps another prompt's choice.
        certified_loss: what ``max_disagreement`` bounds: the share of unlike ``tokens``, the share of unlike
            ``answers``, or the loss in a ``task``.
        exit_min_depth: tokens exit only after at least this many layers.
        exits_when: ``pays``: boundaries that do not save time by the measured costs are off; ``always``: all are on.
        confidence_measure: ``probability``, ``margin`` or ``entropy``.
        capacity: for policy ``capacity``, the share of rows that goes deeper at each boundary, in (0, 1].
        kv_policy: K/V of skipped layers: ``fitted``, ``copy``, ``deferred`` or ``full``; None takes the checkpoint's.
        prefill_share: share of prompt tokens that stop at a boundary, those whose approximate K/V later tokens need
            least; some stop early, all of them before the last stage. None: prompts run every layer.
        prefill_tail: last tokens of a prompt that always run every layer.
        exit_layer: static: every token stops at this depth.
        skip_layers: static: layers that no token runs.
        static_cost: static: share of layers to keep, in (0, 1]; the rest is skipped evenly (arXiv 2404.06954).
        compile: ``auto``: layers that are known run through compiled kernels where there are some, the others through
            their own code; ``off``: all layers run their own code.
        cuda_graphs: ``auto``: on a GPU whose kernels run, launches that only decode are replayed from CUDA graphs;
            ``off``: all launches are started kernel by kernel.
        async_scheduling: ``auto``: on a GPU a step is queued before the tokens of the last one are read, unless a
            boundary is asked within it; ``on``: on a CPU as well, where nothing is gained; ``off``.
        num_threads: CPU threads; None keeps torch's choice.
        seed: base of the seeds of sampled requests that bring none.
        selfcheck: compare with the model's own forward at load, refuse a model that differs, and find windows that only
            its mask has.
    """

    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int = 2048
    kv_memory_fraction: float = 0.5
    page_size: int = 32
    prefix_caching: bool = True
    policy: str = "auto"
    exits: str | None = None
    mode: str = "exits"
    exit_threshold: float | None = None
    exit_error: float | None = None
    max_disagreement: float | None = None
    certified_loss: str = "tokens"
    exit_min_depth: int = 0
    exits_when: str = "pays"
    confidence_measure: str = "probability"
    capacity: float | None = None
    kv_policy: str | None = None
    prefill_share: float | None = None
    prefill_tail: int = 32
    exit_layer: int | None = None
    skip_layers: tuple[int, ...] = ()
    static_cost: float | None = None
    compile: str = "auto"
    cuda_graphs: str = "auto"
    async_scheduling: str = "auto"
    num_threads: int | None = None
    seed: int = 0
    selfcheck: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", DTYPES),
            ("policy", POLICIES),
            ("exits_when", EXITS_WHEN),
            ("mode", MODES),
            ("compile", COMPILE),
            ("cuda_graphs", CUDA_GRAPHS),
            ("async_scheduling", ASYNC_SCHEDULING),
            ("confidence_measure", MEASURES),
            ("certified_loss", LOSSES),
        ):
            check_choice(name, getattr(self, name), known)
        if self.kv_policy is not None:
            check_choice("kv_policy", self.kv_policy, KV_POLICIES)
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "page_size", "num_threads"):
            value = getattr(self, name)
            if value is None and name not in ("max_num_batched_tokens", "page_size"):
                continue
            if not is_integer(value) or value < 1:
                raise UserError(f"{name} must be a positive integer, got {value!r}")
        if not _is_share(self.kv_memory_fraction):
            raise UserError(f"kv_memory_fraction must be in (0, 1], got {self.kv_memory_fraction!r}")
        if not is_integer(self.seed):
            raise UserError(f"seed must be an integer, got {self.seed!r}")
        for name in ("trust_remote_code", "prefix_caching", "selfcheck"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, got {getattr(self, name)!r}")
        self._check_policy()
        self._check_exits()

    @property
    def resolved_policy(self) -> str:
        """The policy with ``auto`` decided."""
        if self.policy != "auto":
            return self.policy
        return "full" if self.exits is None else "router"

    def _check_policy(self) -> None:
        if self.exit_layer is not None and not is_integer(self.exit_layer):
            raise UserError(f"exit_layer must be an integer, got {self.exit_layer!r}")
        if not isinstance(self.skip_layers, (list, tuple)) or not all(map(is_integer, self.skip_layers)):
            raise UserError(f"skip_layers must be a list of layer numbers, got {self.skip_layers!r}")
        chosen = [
            name
            for name, is_set in (
                ("exit_layer", self.exit_layer is not None),
                ("skip_layers", bool(self.skip_layers)),
                ("static_cost", self.static_cost is not None),
            )
            if is_set
        ]
        if self.policy != "static" and chosen:
            raise UserError(f"{chosen[0]} needs policy 'static', got policy {self.policy!r}")
        if self.policy == "static" and len(chosen) != 1:
            raise UserError(
                "policy 'static' needs exactly one of exit_layer, skip_layers, static_cost; "
                f"got {', '.join(chosen) or 'none'}"
            )
        if self.static_cost is not None and not _is_share(self.static_cost):
            raise UserError(f"static_cost must be in (0, 1], got {self.static_cost!r}")

    def _check_exits(self) -> None:
        if self.policy in ("router", "confidence", "capacity", "posthoc") and self.exits is None:
            raise UserError(f"policy {self.policy!r} needs exits, a router checkpoint")
        if self.policy == "static" and self.exits is not None:
            raise UserError(f"exits needs another policy than 'static', got {self.exits!r}")
        if (self.policy == "capacity") != (self.capacity is not None):
            raise UserError(f"capacity goes with policy 'capacity', got {self.capacity!r} with policy {self.policy!r}")
        if self.policy == "confidence" and self.exit_threshold is None:
            raise UserError("policy 'confidence' needs exit_threshold, got none")
        if self.exit_threshold is not None and self.exit_error is not None:
            raise UserError("exit_threshold and exit_error exclude each other, got both")
        for name in ("exit_threshold", "exit_error"):
            value = getattr(self, name)
            if value is not None and not (_is_share(value) or value == 0):
                raise UserError(f"{name} must be in [0, 1], got {value!r}")
        for name in ("capacity", "prefill_share", "max_disagreement"):
            value = getattr(self, name)
            if value is not None and not _is_share(value):
                raise UserError(f"{name} must be in (0, 1], got {value!r}")
        for name in ("exit_min_depth", "prefill_tail"):
            value = getattr(self, name)
            if not is_integer(value) or value < 0:
                raise UserError(f"{name} must be an integer of at least 0, got {value!r}")
        for name in ("exit_threshold", "exit_error", "max_disagreement", "kv_policy", "prefill_share"):
            if self.exits is None and getattr(self, name) is not None:
                raise UserError(f"{name} needs exits, a router checkpoint, got {getattr(self, name)!r}")
        if self.mode == "verified":
            self._check_verified()
        if self.max_disagreement is not None:
            self._check_certified()

    def _check_verified(self) -> None:
        """Answers that are full depth's need gates to draft, exact K/V, and no certificate."""
        if self.exits is None:
            raise UserError(f"mode needs exits, a router checkpoint, got {self.mode!r}")
        for name, allowed in (
            ("policy", ("auto", "router", "confidence")),
            ("kv_policy", (None, "deferred")),
            ("prefill_share", (None,)),
            ("max_disagreement", (None,)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"mode 'verified' and this {name} exclude each other, got {name} {value!r}")

    def _check_certified(self) -> None:
        """What a certificate settles is not to be set beside it."""
        if self.policy not in ("auto", "router"):
            raise UserError(f"max_disagreement needs policy 'router', got policy {self.policy!r}")
        for name, unset in (
            ("exit_threshold", None),
            ("exit_error", None),
            ("exit_min_depth", 0),
            ("prefill_share", None),
        ):
            if getattr(self, name) != unset:
                raise UserError(f"max_disagreement and {name} exclude each other, got {name} {getattr(self, name)!r}")


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raises UserError unless the setting ``name`` has one of the values that are ``known``."""
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
