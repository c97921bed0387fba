"""The config of a run: how many subcomponents each module has, which Γ, which target; what is not known is refused by name.

====================================  ===============================================================================
config                                has
====================================  ===============================================================================
``experiment_config.yaml`` (newer)    ``pd.decomposition_targets``, ``pd.ci_config``, ``target.spec``, ``data``
``final_config.yaml`` (older)         ``module_info``, ``ci_config``, ``pretrained_model_name``; before that
                                      ``target_module_patterns`` with one ``C``, ``ci_fn_type``, ``ci_fn_hidden_dims``
``cfg`` in a single file              ``C_per_module``, ``ci_d_model``, ``ci_n_blocks``, ``ci_n_heads``, ``ci_mlp_hidden``
====================================  ===============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any

from tl_vpd.checks import shown
from tl_vpd.importance import GammaConfig
from tl_vpd.printing import Printed

ROPE_BASE = 10_000.0
TARGET_CLASS = "LlamaSimpleMLP"


@dataclass(frozen=True)
class RunConfig(Printed):
    """What is needed of a run's config.

    Attributes:
        source: the file it was read from, for messages.
        counts: number of subcomponents C by pattern of modules.
        gamma: which Γ, of the authors' numbers.
        target: where the target comes from: ``wandb:…`` or a path (None: not said).
        tokenizer: the name of the target's tokenizer (None: not said, or there is none).
        settings: the whole config, as it was read.
    """

    source: str
    counts: tuple[tuple[str, int], ...]
    gamma: GammaConfig
    target: str | None
    tokenizer: str | None
    settings: dict[str, Any]

    @classmethod
    def read(cls, settings: Mapping[str, Any], source: str) -> RunConfig:
        """Reads a config of any variant.

        Args:
            settings: the file's content.
            source: of the config, for messages.

        Raises:
            ValueError: it is of another kind of run, or has a setting that cannot be read; the message names it.
        """
        reader = _Reader(source)
        try:
            if "C_per_module" in settings:
                return reader.single_file(settings)
            if "pd" in settings:
                return reader.newer(settings)
            return reader.older(settings)
        except KeyError as error:
            raise ValueError(
                f"{source} has no {error.args[0]}: it is not the config of a decomposition that is read."
            ) from error
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{source} has a setting of the wrong kind ({str(error).splitlines()[0].rstrip('.')})."
            ) from error

    def check_counts(self, counts: Mapping[str, int]) -> None:
        """Raises ValueError unless the checkpoint's C are the config's, module by module."""
        for pattern, C in self.counts:
            matched = [module for module in counts if fnmatchcase(module, pattern)]
            if not matched:
                raise ValueError(f"{self.source} decomposes {pattern}, and the checkpoint has no such module.")
            for module in matched:
                if counts[module] != C:
                    raise ValueError(
                        f"C of {module} is {counts[module]} in the checkpoint, and {self.source} says {C}."
                    )
        for module in counts:
            if not any(fnmatchcase(module, pattern) for pattern, _ in self.counts):
                raise ValueError(f"The checkpoint decomposes {module}, which {self.source} does not list.")


def as_data(value: Any) -> Any:
    """A value of YAML or of a checkpoint as JSON can hold it; dates, infinite numbers and objects become text."""
    if isinstance(value, Mapping):
        return {str(key): as_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(entry) for entry in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, str | bool | int | float | NoneType) else str(value)


@dataclass(frozen=True)
class _Reader:
    source: str

    def newer(self, settings: Mapping[str, Any]) -> RunConfig:
        pd, target = settings["pd"], settings.get("target") or {}
        self.refuse(pd, "identity_decomposition_targets", "tied_weights")
        spec = target.get("spec") or {}
        self.check_class(spec.get("model_class"))
        if (spec.get("kind") or "pretrained") != "pretrained":
            raise ValueError(
                f"{self.source}: target.spec.kind is {spec['kind']!r}, and 'pretrained' is the one that is read."
            )
        return RunConfig(
            self.source,
            self.patterns(pd["decomposition_targets"]),
            self.gamma(pd["ci_config"], pd),
            self.text("target.spec.run_path", spec.get("run_path") or spec.get("name")),
            self.tokenizer(settings.get("data") or {}),
            as_data(settings),
        )

    def older(self, settings: Mapping[str, Any]) -> RunConfig:
        self.refuse(settings, "identity_module_info", "identity_module_patterns", "tied_weights")
        self.check_class(settings.get("pretrained_model_class"))
        if "module_info" in settings:
            counts = self.patterns(settings["module_info"])
        else:
            counts = self.patterns(
                [{"module_pattern": p, "C": settings["C"]} for p in settings["target_module_patterns"]]
            )
        ci_config = settings.get("ci_config") or {
            "mode": "layerwise",
            "fn_type": settings["ci_fn_type"],
            "hidden_dims": settings["ci_fn_hidden_dims"],
        }
        return RunConfig(
            self.source,
            counts,
            self.gamma(ci_config, settings),
            self.text(
                "pretrained_model_name",
                settings.get("pretrained_model_name") or settings.get("pretrained_model_path"),
            ),
            self.tokenizer({**(settings.get("task_config") or {}), **settings}),
            as_data(settings),
        )

    def single_file(self, settings: Mapping[str, Any]) -> RunConfig:
        gamma = self.sized(
            kind="shared_transformer",
            causal=False,
            d_ci=settings["ci_d_model"],
            n_blocks=settings["ci_n_blocks"],
            n_heads=settings["ci_n_heads"],
            d_mlp=settings["ci_mlp_hidden"],
        )
        self.check_base(settings.get("ci_rope_base", ROPE_BASE))
        counts = self.patterns([{"module_pattern": m, "C": C} for m, C in settings["C_per_module"].items()])
        return RunConfig(self.source, counts, gamma, None, self.tokenizer(settings), as_data(settings))

    def gamma(self, ci: Mapping[str, Any], settings: Mapping[str, Any]) -> GammaConfig:
        sigmoid = settings.get("sigmoid_type", "leaky_hard")
        if sigmoid != "leaky_hard":
            raise ValueError(f"{self.source}: sigmoid_type is {sigmoid!r}, and 'leaky_hard' is the one that is read.")
        sampling = settings.get("sampling", "continuous")
        if sampling != "continuous":
            raise ValueError(f"{self.source}: sampling is {sampling!r}, and 'continuous' is the one that is read.")
        mode, kind, hidden = ci.get("mode"), ci["fn_type"], ci.get("hidden_dims")
        if kind == "global_shared_transformer" and mode in (None, "global"):
            return self.transformer(ci["simple_transformer_ci_cfg"])
        if kind == "mlp" and mode in (None, "layerwise"):
            if not isinstance(hidden, list) or len(hidden) != 1:
                raise ValueError(
                    f"{self.source}: hidden_dims of the small MLPs is {hidden}, and one hidden layer is what is read."
                )
            return self.sized(kind="per_subcomponent_mlps", hidden=hidden[0])
        raise ValueError(
            f"{self.source}: a Γ of fn_type {kind!r} (mode {mode!r}) is not read; 'global_shared_transformer' and 'mlp' (one "
            "small MLP per subcomponent) are."
        )

    def transformer(self, size: Mapping[str, Any]) -> GammaConfig:
        attention, d_mlp = size["attn_config"], size.get("mlp_hidden_dim")
        self.check_base(attention.get("rope_base", ROPE_BASE))
        if d_mlp is not None and len(d_mlp) != 1:
            raise ValueError(f"{self.source}: mlp_hidden_dim of Γ is {d_mlp}, and one hidden layer is what is read.")
        return self.sized(
            kind="shared_transformer",
            causal=False,
            d_ci=size["d_model"],
            n_blocks=size["n_blocks"],
            n_heads=attention["n_heads"],
            d_mlp=d_mlp[0] if d_mlp else None,
        )

    def sized(self, **sizes: Any) -> GammaConfig:
        try:
            return GammaConfig(**sizes)
        except ValueError as error:
            raise ValueError(f"{self.source}: {str(error).splitlines()[0].rstrip('.')}.") from error

    def patterns(self, entries: Any) -> tuple[tuple[str, int], ...]:
        counts = []
        for entry in entries:
            pattern, C = entry["module_pattern"], entry["C"]
            if not isinstance(pattern, str) or not isinstance(C, int) or isinstance(C, bool) or C < 1:
                raise ValueError(
                    f"{self.source}: C of {shown(pattern)} is {shown(C)}, and a pattern of modules with a number of at least 1 "
                    "is needed."
                )
            counts.append((pattern, C))
        return tuple(counts)

    def text(self, name: str, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.source}: {name} is {shown(value)}, and text is needed.")
        return value

    def tokenizer(self, settings: Mapping[str, Any]) -> str | None:
        name = settings.get("tokenizer_name") or settings.get("pretrained_tokenizer_name")
        return None if name in (None, "none") else str(name)

    def check_class(self, path: str | None) -> None:
        if path is not None and path.rsplit(".", 1)[-1] != TARGET_CLASS:
            raise ValueError(
                f"{self.source}: the target is a {path.rsplit('.', 1)[-1]}, and only {TARGET_CLASS} is read."
            )

    def check_base(self, base: Any) -> None:
        try:
            same = float(base) == ROPE_BASE  # YAML reads 1e4, without a dot, as text
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                f"{self.source}: Γ's rope_base is {shown(base)}, and {ROPE_BASE:g} is the one that is read."
            )

    def refuse(self, settings: Mapping[str, Any], *names: str) -> None:
        for name in names:
            if settings.get(name):
                raise ValueError(f"{self.source}: {name} is set, and such runs are not read.")
