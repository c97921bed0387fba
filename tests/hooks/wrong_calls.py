"""Wrong prompts, masks, positions, subcomponents, options and devices, each with the sentence that refuses it.

A script of its own; ``tests/test_wrong_calls.py`` runs it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tests.wrong_calls import Call, check
from tl_vpd import Decomposition, GammaConfig, Masks, SiteMask, Subcomponent, bundled
from tl_vpd.adapters.loading import load_model
from tl_vpd.adapters.versions import HookedTransformer
from tl_vpd.hooks import attached_to, attachment_of

Q, K, OUT = "blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.1.mlp.W_out"
NAN, INF = float("nan"), float("inf")
model = tiny_model()
vpd = decomposition_of(model).double()
tokens = some_tokens()
shipped, shipped_vpd = bundled.model(), bundled.decomposition()
anything: Any = Path
ones = torch.ones(2, 7, 6)


def ci(prompts: Any = tokens, **options: Any) -> Callable[[], Any]:
    """Importances of prompts."""
    return lambda: vpd.causal_importances(model, prompts, **options)


def attended(attention_mask: Any) -> Callable[[], Any]:
    """Importances with an attention mask."""
    return ci(attention_mask=attention_mask)


def attached(call: Callable[[Any], Any]) -> Callable[[], Any]:
    """A call while the decomposition is attached."""

    def inside() -> None:
        with vpd.attach(model) as attachment, torch.no_grad():
            call(attachment)

    return inside


def masked(*arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of the model in ``masked``."""

    def call(attachment: Any) -> None:
        with attachment.masked(*arguments, **options):
            model(tokens)

    return attached(call)


def kept(*arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of the model in ``keep_only``."""

    def call(attachment: Any) -> None:
        with attachment.keep_only(*arguments, **options):
            model(tokens)

    return attached(call)


def hooked(make: Callable[[], Any]) -> Callable[[], Any]:
    """A call of the model with hooks."""
    return attached(lambda _: model.run_with_hooks(tokens, fwd_hooks=make()))


def ablated(*arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of the model with ablation hooks."""
    return hooked(lambda: vpd.ablation_hooks(*arguments, **options))


def returns(kind: str, value: Any) -> Callable[[], Any]:
    """A call of the model with a user's hook on one of the HookPoints."""
    return hooked(lambda: [(f"blocks.0.hook_q_{kind}", lambda tensor, hook: value(tensor))])


def with_a_pad_token(prompts: Any) -> Callable[[], Any]:
    """Importances of a model whose pad token is neither BOS nor EOS."""

    def call() -> None:
        before = shipped.tokenizer.pad_token
        shipped.tokenizer.pad_token = shipped.tokenizer.decode([7])
        try:
            shipped_vpd.causal_importances(shipped, prompts)
        finally:
            shipped.tokenizer.pad_token = before

    return call


def calls_with_prompts() -> Iterator[Call]:
    """Tokens, text and attention masks."""
    yield ci(None), TypeError, "Prompts are a NoneType: give a string, a list of strings, or tokens"
    yield ci(b"abc"), TypeError, "Prompts are a bytes"
    yield ci({1, 2}), TypeError, "Prompts are a set"
    yield ci([]), ValueError, "There are no prompts: the list is empty"
    yield ci([[]]), ValueError, "Tokens are float64 of shape"
    yield ci(tokens[:0]), ValueError, r"There are no tokens: the shape is \(0, 7\)"
    yield ci(tokens[:, :0]), ValueError, r"There are no tokens: the shape is \(2, 0\)"
    yield ci([[1, 2], [3]]), ValueError, "The rows of tokens have 1, 2 entries: pad them"
    yield ci([[[1, 2], [3]], [[1], [2]]]), ValueError, "lists of several lengths"
    yield ci([[1, 2], 3]), ValueError, "The rows of tokens have 0, 2 entries"
    yield ci(["a", 3]), TypeError, "Of 2 prompts 1 are strings"
    yield ci("abc"), ValueError, "This model has no tokenizer to read text with"
    yield ci([["a", "b"]]), ValueError, "integers .* are needed"
    yield ci(tokens.double()), ValueError, r"Tokens are float64 of shape \(2, 7\); integers"
    yield ci(tokens > 3), ValueError, "Tokens are bool"
    yield ci(tokens.numpy() * 1.0), ValueError, "Tokens are float64"
    yield ci(tokens * 1j), ValueError, "Tokens are complex"
    yield ci([[10**30]]), ValueError, "Tokens are object"
    yield ci([[None]]), ValueError, "Tokens are object"
    yield ci(torch.tensor(3)), ValueError, r"Tokens are of shape \(\)"
    yield ci(tokens[None]), ValueError, r"Tokens are of shape \(1, 2, 7\)"
    yield ci(tokens.to("meta")), ValueError, "without data or a sparse one"
    yield ci(tokens.to_sparse()), ValueError, "without data or a sparse one"
    yield ci(tokens - 5), ValueError, "outside the vocabulary 0..10"
    yield ci(np.array([[2**64 - 1]], dtype=np.uint64)), ValueError, "outside the vocabulary"
    yield ci(torch.zeros(1, 11, dtype=torch.uint8)), ValueError, "longer than the model's context of 10"
    yield with_a_pad_token([[7, 7, 7]]), ValueError, r"The tokens have no real token in rows \[0\]"
    yield (
        with_a_pad_token([[1, 2, 7], [7, 7, 7]]),
        ValueError,
        r"no real token in rows \[1\]: leave out rows",
    )

    additive = torch.zeros(2, 7)
    additive[0, 0] = -INF
    yield attended(additive), ValueError, "other entries than 0 and 1: give 1 .* at real tokens"
    yield attended(additive.nan_to_num(neginf=-1e9)), ValueError, "other entries than 0 and 1"
    yield attended(torch.zeros(2, 7)), ValueError, r"attention_mask has no real token in rows \[0, 1\]"
    yield attended(torch.full((2, 7), 0.5)), ValueError, "other entries than 0 and 1"
    yield attended(torch.full((2, 7), NAN)), ValueError, "other entries than 0 and 1"
    yield attended(torch.full((2, 7), 2)), ValueError, "other entries than 0 and 1"
    for shape in ((2, 8), (2, 6), (3, 7), (7,), (2, 1, 7, 7), (2, 7, 1), ()):
        yield attended(torch.ones(shape)), ValueError, r"attention_mask is \(.*\) and the tokens are \(2, 7\)"
    yield attended("ones"), TypeError, "attention_mask is a str"
    yield attended([[1] * 7, [1] * 6]), TypeError, "attention_mask is a list"
    yield (
        attached(lambda _: model.run_with_cache(tokens[:, :4], attention_mask=torch.full((2, 4), 2))),
        ValueError,
        "than 0 and 1",
    )


def calls_with_masks() -> Iterator[Call]:
    """Masks, values and amounts."""
    for value, error, message in (
        (None, TypeError, "The mask function returned None for blocks.0.attn.W_Q: return one factor"),
        (1.0, TypeError, "The mask of blocks.0.attn.W_Q is a float"),
        (
            ones[0],
            ValueError,
            r"leaves open what its axes are: give \[C\] for all tokens, or \[batch, pos, C\].*unsqueeze",
        ),
        (ones[:, 0], ValueError, "which leaves open what its axes are"),
        (ones[None], ValueError, "which leaves open what its axes are"),
        (torch.ones(5), ValueError, r"this forward pass needs \(2, 7, 6\)"),
        (ones[:, :3], ValueError, r"is \(2, 3, 6\), this forward pass needs \(2, 7, 6\)"),
        (torch.full((6,), NAN), ValueError, "has 6 of 6 factors that are NaN, infinite or beyond 65504"),
        (ones * 1e5, ValueError, "has 84 of 84 factors that are NaN"),
        (SiteMask(None, torch.tensor(-INF)), ValueError, "Δ's mask for .* has 1 of 1 factors"),
        (ones * 1j, TypeError, "is of torch.complex64, torch.strided, on cpu: give dense real"),
    ):
        yield masked(lambda site, acts, value=value: value), error, message
        yield hooked(lambda value=value: vpd.mask_hooks(lambda site, acts: value)), error, message
        if value is not None:
            message = message.replace("this forward pass needs", "(this forward|the site has 6 subcomponents)|")
            yield masked({Q: value}), error, message
            yield hooked(lambda value=value: vpd.mask_hooks({Q: value})), error, message
    for value, message in (
        (SiteMask(None, ones[:, 0]), r"Δ's mask for .* is \(2, 6\), this forward pass needs \(2, 7\)"),
        (SiteMask(None, torch.ones(6)), r"Δ's mask for .* is \(6,\), which leaves open .* or \[batch, pos\]"),
        (SiteMask(None, 0.0, torch.ones(8).bool()), r"(routing|mask) for .* is \(8,\), which leaves open"),
    ):
        yield masked({Q: value}), ValueError, message
        yield masked(lambda site, acts, value=value: value), ValueError, message
    for wrong, error, message in (
        ({}, ValueError, "There are no masks, so nothing would be masked"),
        (Masks({}), ValueError, "There are no masks"),
        ({3: torch.ones(6)}, KeyError, "The masks name 3, which is not decomposed"),
        (
            {"blocks.0.attn.hook_q": torch.ones(6)},
            KeyError,
            "which is not decomposed .did you mean 'blocks.0.attn.W_Q'",
        ),
        ([torch.ones(6)], TypeError, "a list: give"),
    ):
        yield masked(wrong), error, message
        yield hooked(lambda wrong=wrong: vpd.mask_hooks(wrong)), error, message
    for factor in (NAN, INF, 1e300, 10**400):
        yield lambda factor=factor: SiteMask(None, factor), ValueError, "SiteMask.delta="
        yield masked("ci", delta=factor), ValueError, "delta=.*: give a finite number"
        yield hooked(lambda factor=factor: vpd.delta_hooks(factor)), ValueError, "value=.*: give a finite number"
        yield ablated(f"{Q}:1", amount=factor), ValueError, "amount=.*: give a finite number"
    yield masked(None), TypeError, "The mode is a NoneType: give a mode's name, masks by site, or a function"
    yield masked({OUT: torch.zeros(6)}, sites="blocks.0.*"), ValueError, "nothing would be masked"
    yield hooked(lambda: vpd.mask_hooks(3)), TypeError, "Masks are a int: give masks by site, or a function"  # type: ignore[arg-type]
    yield lambda: SiteMask.of([1.0], "a"), TypeError, "The mask of a is a list: give a tensor .* or a SiteMask"  # type: ignore[arg-type]
    yield lambda: SiteMask([1.0], None), TypeError, "SiteMask.mask is a list: give a tensor or None"  # type: ignore[arg-type]
    yield lambda: SiteMask(None, "drawn"), TypeError, "SiteMask.delta='drawn' is a str: give a number"  # type: ignore[arg-type]
    yield lambda: SiteMask(None, None, True), TypeError, "SiteMask.routed is a bool: give a tensor or None"  # type: ignore[arg-type]
    yield lambda: SiteMask(None, 0.0, ones), TypeError, "SiteMask.routed is of torch.float32: give a tensor of bools"
    yield lambda: SiteMask(None, True), TypeError, "SiteMask.delta=True is a bool"
    yield hooked(lambda: vpd.delta_hooks(anything)), TypeError, "is a type: give a number"
    yield ablated(f"{Q}:1", amount="all"), TypeError, "amount='all' is a str: give a number"
    yield ablated(f"{Q}:1", values=[1.0]), TypeError, "values is a list: give tensors by site"
    yield ablated(f"{Q}:1", values={}), KeyError, "values has nothing for blocks.0.attn.W_Q"
    yield ablated(f"{OUT}:1", values={"blocks.1.mlp.W_ou": torch.ones(6)}), KeyError, "nothing for .*did you mean"
    yield ablated(f"{Q}:1", values={Q: torch.zeros(7, 5)}), ValueError, r"is \(7, 5\).*has 6 subcomponents"
    yield (
        ablated(f"{Q}:1", values={Q: torch.zeros(7, 6)}),
        ValueError,
        r"is \(7, 1\), which leaves open.*unsqueeze\(0\)",
    )
    others = vpd.component_acts(model, some_tokens(shape=(3, 5)))
    message = (
        r"values for blocks\.1\.hook_out_component_acts is \(3, 5, 2\).*needs \(2, 7, \d\): masks and values belong to"
    )
    yield ablated([f"{OUT}:2", f"{OUT}:4"], values=others), ValueError, message
    look = [("blocks.1.hook_out_mask", lambda mask, hook: None)]
    yield (
        hooked(lambda: [*vpd.ablation_hooks([f"{OUT}:2", f"{OUT}:4"], values=others), *look]),
        ValueError,
        message,
    )
    yield ablated(f"{Q}:1", amount=True), TypeError, "amount=True is a bool"
    yield ablated(f"{Q}:1", values={0: None}), KeyError, "values has nothing for blocks.0.attn.W_Q"
    yield ablated(f"{Q}:1", values={Q: [1.0]}), TypeError, "values of blocks.0.attn.W_Q is a list"
    yield ablated(f"{Q}:1", values={Q: torch.tensor(1.0)}), ValueError, "and the site has 6 subcomponents"
    for value in (NAN, INF, 1e300):
        yield (
            ablated(f"{Q}:1", values={Q: torch.full((6,), value, dtype=torch.float64)}),
            ValueError,
            "values of .* 6 of 6 entries",
        )
    yield lambda: vpd.ablation_hooks.__func__(None, f"{Q}:1"), TypeError, "give a tl_vpd.Decomposition"
    yield lambda: vpd.mask_hooks.__func__(3, {}), TypeError, "The decomposition is a int"
    yield lambda: vpd.delta_hooks.__func__({}, 0.0), TypeError, "The decomposition is a dict"
    yield returns("mask", lambda mask: mask[0]), ValueError, "The mask for blocks.0.attn.W_Q .* leaves open"
    yield returns("delta_mask", lambda mask: mask[:, :3]), ValueError, "Δ's mask for blocks.0.attn.W_Q"
    yield (
        returns("component_acts", lambda acts: acts[:1]),
        ValueError,
        r"returned \(1, 7, 6\): return \(2, 7, 6\) or None",
    )


def calls_with_names() -> Iterator[Call]:
    """Subcomponents, sites and positions."""
    for wrong, error, message in (
        ([(Q, 1)], TypeError, r"=\[\('blocks.0.attn.W_Q', 1\)\]: give 'site:index'"),
        ((Q, 1), (TypeError, ValueError), "give 'site:index'"),
        (3, TypeError, "=3: give 'site:index'"),
        (None, TypeError, "=None: give 'site:index'"),
        (f"{Q}:6", IndexError, "has 6 subcomponents, 0 to 5"),
        (f"{Q}:-1", ValueError, "give 'site:index'"),
        ("blocks.0.attn.hook_q:1", KeyError, "did you mean 'blocks.0.attn.W_Q'"),
    ):
        yield ablated(wrong), error, message
        yield kept(wrong), error, message
        if wrong is not None:
            yield lambda wrong=wrong: vpd.adversarial_masks(model, tokens, node_set=wrong), error, message
    for options, error, message in (
        ({"check_weights": "no"}, TypeError, "check_weights='no' is a str: give True or False"),
        ({"check_weights": 0}, TypeError, "check_weights=0 is a int"),
        ({"hooks": 3}, TypeError, "hooks=3 is a int"),
        ({"hooks": ["ci", 3]}, KeyError, "hooks: 3 is not a kind of hook"),
        ({"hooks": ["cl"]}, KeyError, "hooks: 'cl' is not a kind of hook.*did you mean 'ci'"),
    ):
        yield lambda options=options: vpd.attach(model, **options), error, message
    yield lambda: vpd.attach(3), TypeError, "The model is a int: give a HookedTransformer"
    yield lambda: attached_to(None), TypeError, "The model is a NoneType"
    yield lambda: attachment_of(None, model), TypeError, "The decomposition is a NoneType"
    yield lambda: Subcomponent(Q, -1), ValueError, "index=-1: give an integer of at least 0"
    for index in (True, 1.0, "1", None, torch.tensor(1.0), np.float32(1)):
        yield lambda index=index: Subcomponent(Q, index), TypeError, "The index is a"
    yield lambda: Subcomponent(anything, 1), TypeError, "The site of a subcomponent is a"
    yield ablated([]), ValueError, "There are no subcomponents to ablate"
    for sites, error, message in (
        ([], ValueError, "The list of sites is empty"),
        (3, TypeError, "The sites are a int"),
        ([3], TypeError, "A pattern of sites is a int"),
        ("blocks.0.attn.hook_k", KeyError, "did you mean 'blocks.0.attn.W_K'"),
        ("blocks.1.mlp.W_Out", KeyError, "did you mean 'blocks.1.mlp.W_out'"),
    ):
        yield masked("zero", sites=sites), error, message
        yield kept(f"{Q}:1", sites=sites), error, message
        yield hooked(lambda sites=sites: vpd.delta_hooks(0.0, sites=sites)), error, message
        yield lambda sites=sites: vpd.adversarial_masks(model, tokens, sites=sites), error, message
        yield lambda sites=sites: vpd.attach(model, sites=sites), error, message
    for pos, error, message in (
        ([], ValueError, r"pos=\[\] selects no position"),
        ([False] * 7, ValueError, "selects no position"),
        (slice(7, None), IndexError, r"pos=slice\(7, None, None\) selects none of the 7 positions"),
        (slice(None, None, 0), ValueError, "the step of a slice is not 0"),
        (slice(0, 1.5), TypeError, "give an index, a slice"),
        (7, IndexError, "pos=7 is outside the 7 positions"),
        (10**5000, IndexError, "pos=a number of thousands of digits is outside the positions of any pass"),
        (np.int64(-8), IndexError, "pos=-8 is outside the 7 positions"),
        ([0, 7], IndexError, "pos=7 is outside the 7 positions"),
        ([None], TypeError, "pos is a list: give an index"),
        (slice("a"), TypeError, "pos=slice.*: give an index, a slice, a sequence of indices, or a mask of one axis"),
        (slice(4, 4), IndexError, "selects none of the 7 positions"),
        (torch.zeros(7).bool(), ValueError, "selects no position"),
        ([True, False], IndexError, "pos is a mask of 2 positions, and there are 7"),
        ([True, 2, 3], TypeError, "pos is a list: give an index"),
        (True, TypeError, "pos is a bool: give an index"),
        (1.0, TypeError, "pos=1.0: give an index"),
        ("1", TypeError, "pos='1': give an index"),
        ({1}, TypeError, "pos is a set: give an index"),
        (np.zeros((2, 7), dtype=bool), TypeError, "pos is a ndarray: give an index"),
        (torch.tensor([0.0]), TypeError, "pos is a Tensor|pos is a list"),
    ):
        yield masked("zero", pos=pos), error, message
        yield kept(f"{Q}:1", pos=pos), error, message
        yield ablated(f"{Q}:1", pos=pos), error, message
        yield ablated(f"{Q}:1", pos=pos, values={Q: torch.ones(6)}), error, message
        yield hooked(lambda pos=pos: vpd.delta_hooks(0.0, pos=pos)), error, message


def calls_with_options() -> Iterator[Call]:
    """Options of modes, of results, and of decompositions."""
    importances = vpd.causal_importances(model, tokens)
    for options, error, message in (
        ({"steps": 0}, ValueError, "steps=0: give an integer of at least 1"),
        ({"steps": -3}, ValueError, "steps=-3: give an integer of at least 1"),
        ({"steps": True}, TypeError, "steps=True is a bool"),
        ({"steps": 2.0}, TypeError, "steps=2.0 is a float"),
        ({"step_size": 0}, ValueError, "step_size=0: give a finite number above 0"),
        ({"step_size": NAN}, ValueError, "step_size=nan"),
        ({"step_size": INF}, ValueError, "step_size=inf"),
        ({"seed": True}, TypeError, "seed=True is a bool"),
        ({"seed": 1 << 64}, ValueError, "seed=.*: give an integer from"),
        ({"seed": -(1 << 63) - 1}, ValueError, "seed=.*: give an integer from"),
        ({"seed": "0"}, TypeError, "seed='0' is a str"),
        ({"seed": 10**5000}, ValueError, "seed=a number of thousands of digits"),
    ):
        yield masked("adversarial", **options), error, message
        yield kept(f"{Q}:1", rest="adversarial", **options), error, message
        yield lambda options=options: vpd.adversarial_masks(model, tokens, **options), error, message
        if "seed" in options:
            yield lambda options=options: importances.masks("stochastic", **options), error, message
    yield (
        masked("roundd"),
        ValueError,
        r"'roundd' is not a mask mode \(did you mean 'rounded'\?\)\. Modes: unmasked, stoch",
    )
    yield masked("zero", delta="often"), ValueError, "give a number, 'drawn'"
    yield masked("ci", delta=[1]), TypeError, r"delta=\[1\] is a list: give a number"
    yield masked("adversarial", delta=0.0), ValueError, "attacks Δ as well"
    yield masked("rounded", threshold="0.1"), TypeError, "threshold='0.1' is a str: give a number"
    yield lambda: importances.masks("adversarial"), ValueError, "need runs of the model"
    yield lambda: vpd.compact(model, tokens, threshold="0.1"), TypeError, "threshold='0.1' is a str: give a number"
    yield lambda: vpd.compact(model, tokens, batch_size=1.5), TypeError, "batch_size=1.5 is a float: give an integer"
    for threshold in (NAN, -0.1, 1.5, INF):
        yield masked("rounded", threshold=threshold), ValueError, "threshold=.*: importances are in"
        yield lambda t=threshold: importances.masks("rounded", threshold=t), ValueError, "importances are in"
    for k in (-1, 0):
        yield lambda k=k: importances.top(k), ValueError, f"k={k}: give an integer of at least 1"
    yield lambda: importances.top(2.0), TypeError, "k=2.0 is a float"
    yield lambda: importances.to_pandas(above=NAN), ValueError, "above=nan: give a finite number of at most 1"
    yield lambda: importances.to_pandas(above=2), ValueError, "above=2: give a finite number of at most 1"
    yield lambda: importances[3], KeyError, "A int is not among these sites"
    yield lambda: importances["blocks.0.attn.hook_q"], KeyError, "did you mean 'blocks.0.attn.W_Q'"
    yield lambda: importances.masks(None), ValueError, "None is not a mask mode"

    folder = Path(tempfile.mkdtemp()) / "vpd"
    vpd.save(folder)
    for device in ("gpuu", "cpu:x", "meta", ""):
        yield lambda d=device: Decomposition.load(folder, device=d), ValueError, "device="
        yield lambda d=device: load_model("gpt2", device=d), ValueError, "device="
    yield lambda: Decomposition.load(folder, device=None), TypeError, "device=None is a NoneType"
    yield lambda: Decomposition.load(folder, dtype="float16"), (TypeError, ValueError), "dtype='float16'"
    yield lambda: Decomposition.load(folder, dtype=torch.int32), (TypeError, ValueError), "int32"
    file = folder / "config.json"
    for path, error, message in (
        (file, NotADirectoryError, "config.json is a file: give the folder"),
        (3, TypeError, "The folder is a int: give its path"),
        ("x" * 10**6, ValueError, "folder=.* is not a path"),
        ("nul\0", ValueError, "folder=.* is not a path: it has a null character"),
    ):
        yield lambda path=path: Decomposition.load(path), error, message
        yield lambda path=path: vpd.save(path), error, message
    yield lambda: load_model(str(file)), NotADirectoryError, "config.json is a file: give the folder"
    yield lambda: load_model(3), TypeError, "The model's name is a int"
    yield lambda: load_model("gpt2", kind="transformer"), ValueError, "kind='transformer'"
    if HookedTransformer is not None:
        yield lambda: load_model("no-such"), ValueError, "'no-such' is neither a folder nor a model"
        yield lambda: load_model(str(file.parent), kind="hooked_transformer"), ValueError, "is a folder, which"

    V, U, gamma = dict(vpd.V), dict(vpd.U), vpd.gamma_config
    rest = {name: p.detach() for name, p in vpd.gamma.named_parameters()}

    def made(V: Any = V, U: Any = U, gamma: Any = gamma, rest: Any = rest) -> Callable[[], Any]:
        return lambda: Decomposition.from_tensors(model, V, U, gamma, rest)

    hub: Any = Decomposition.from_hub
    yield lambda: hub(5), TypeError, "repository=5 is a int: give a string"
    yield lambda: hub("user/repo", revision=5), TypeError, "revision=5 is a int: give a string"
    yield lambda: vpd.push_to_hub(None), TypeError, "repository=None is a NoneType: give a string"  # type: ignore[arg-type]
    yield lambda: vpd.model_card("repo"), ValueError, "'repo' is not the name of a repository"
    for options, message in (
        ({"private": "yes"}, "private='yes' is a str: give True or False"),
        ({"report": {}}, r"report={} is a dict: give what tl_vpd.evaluate returns"),
        ({"card": {}}, "A dict came where CardConfig is needed"),
    ):
        yield lambda options=options: vpd.push_to_hub("user/repo", **options), TypeError, message

    yield made(V=[V[Q]]), TypeError, "V is a list: give tensors by name"
    yield made(U=None), TypeError, "U is a NoneType"
    yield made(gamma={}), TypeError, r"give GammaConfig\(...\)"
    yield made(rest=()), TypeError, "gamma_tensors is a tuple"
    yield made(V={**V, Q: V[Q].tolist()}), TypeError, "V/blocks.0.attn.W_Q is a list"
    yield made(V={**V, Q: V[Q][0]}), ValueError, r"V/blocks.0.attn.W_Q is \(6,\)"
    yield made(V={**V, Q: V[Q].int()}), ValueError, "give floating-point numbers"
    yield made(U={**U, Q: U[Q].tolist()}), TypeError, "U/blocks.0.attn.W_Q is a list"
    yield made(U={**U, Q: U[Q] * NAN}), ValueError, "U/blocks.0.attn.W_Q has 48 of 48 entries that are NaN"
    yield made(gamma=GammaConfig(kind="per_site_mlps")), KeyError, "needs the tensors"


if __name__ == "__main__":
    for group in (calls_with_prompts, calls_with_masks, calls_with_names, calls_with_options):
        check(list(group()), model)
