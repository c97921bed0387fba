"""What it takes to import a run of the paper's size: seconds and peak memory, for both classes of model.

    python -m benchmarks.released_import        # benchmarks/results/import.json; 3 minutes each on two busy cores

The run is made here: the paper's keys and shapes (4 layers, 38,912 subcomponents, Γ of 8 blocks of width 2048; 3 GB) with every
number 0, written as a sparse file. Each import runs in a process that does nothing else. *Kept* is what model and decomposition
take, *peak* the most that the process had for itself (``RssAnon``, without the mapped file) beside *before*, what Python and its
libraries take; *resident* is the most with the pages of the file that the system had not dropped (``VmHWM``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import harness

COUNTS = {"q_proj": 512, "k_proj": 512, "v_proj": 1024, "o_proj": 1024, "c_fc": 3072, "down_proj": 3584}
LAYERS, D, D_MLP, VOCABULARY, D_CI, BLOCKS, HEADS = 4, 768, 3072, 50_277, 2048, 8, 16
GB = 1e9


def write_run(folder: Path) -> None:
    """The paper's run in its own format (``final_config.yaml``, ``model_400000.pth``), all numbers 0."""
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (D, D))
    sizes |= {"c_fc": (D, D_MLP), "down_proj": (D_MLP, D)}
    kinds = [f"{'attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}" for name in sizes]
    state: dict[str, torch.Tensor] = {"target_model.wte.weight": torch.empty(VOCABULARY, D)}
    state["target_model.lm_head.weight"] = state["target_model.wte.weight"]
    state["target_model.ln_f.weight"] = torch.empty(D)
    for i in range(LAYERS):
        for norm in ("rms_1", "rms_2"):
            state[f"target_model.h.{i}.{norm}.weight"] = torch.empty(D)
        for kind in kinds:
            d_in, d_out = sizes[kind.split(".")[1]]
            C, name = COUNTS[kind.split(".")[1]], f"h.{i}.{kind}"
            state[f"target_model.{name}.weight"] = torch.empty(d_out, d_in)
            state[f"_components.{name.replace('.', '-')}.V"] = torch.empty(d_in, C)
            state[f"_components.{name.replace('.', '-')}.U"] = torch.empty(C, d_out)
    total_in, total = LAYERS * sum(d for d, _ in sizes.values()), LAYERS * sum(COUNTS.values())
    g = "ci_fn._global_ci_fn."
    state |= {f"{g}_input_projector.W": torch.empty(total_in, D_CI), f"{g}_input_projector.b": torch.empty(D_CI)}
    state |= {f"{g}_output_head.W": torch.empty(D_CI, total), f"{g}_output_head.b": torch.empty(total)}
    for b in range(BLOCKS):
        for name in ("q", "k", "v", "out"):
            state[f"{g}_blocks.{b}.attn.{name}_proj.weight"] = torch.empty(D_CI, D_CI)
        for name, d_in, d_out in (("0", D_CI, 4 * D_CI), ("2", 4 * D_CI, D_CI)):
            state[f"{g}_blocks.{b}.mlp.{name}.W"] = torch.empty(d_in, d_out)
            state[f"{g}_blocks.{b}.mlp.{name}.b"] = torch.empty(d_out)
    with torch.serialization.skip_data():  # leaves holes in the file, which read as 0
        torch.save(state, folder / "model_400000.pth")
    attention = {"n_heads": HEADS, "max_len": 512, "rope_base": 10_000.0}
    size = {"d_model": D_CI, "n_blocks": BLOCKS, "mlp_hidden_dim": [4 * D_CI], "attn_config": attention}
    config = {
        "module_info": [{"module_pattern": f"h.*.{kind}", "C": COUNTS[kind.split(".")[1]]} for kind in kinds],
        "ci_config": {"mode": "global", "fn_type": "global_shared_transformer", "simple_transformer_ci_cfg": size},
        "sigmoid_type": "leaky_hard",
        "pretrained_model_name": "wandb:goodfire/spd/runs/t-9d2b8f02",
    }
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def measured(folder: Path, model_class: str) -> dict[str, Any]:
    """One import, in this process."""
    from tl_vpd.formats import load_param_decomp

    before, peak, done = status("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokens = torch.arange(4 * 64).view(4, 64)
    start, cpu = time.perf_counter(), time.process_time()
    model, vpd = load_param_decomp(folder, model_class, tokens=tokens)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    kept = sum(t.numel() * t.element_size() for m in (model, vpd) for t in (*m.parameters(), *m.buffers())) / GB
    return {
        "model_class": model_class,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "kept_gb": round(kept, 2),
        "peak_gb": round(peak[0] - before, 2),
        "before_gb": round(before, 2),
        "resident_gb": round(status("VmHWM"), 2),
        "subcomponents": vpd.site_axis.total,
        "parameters": sum(p.numel() for m in (model, vpd) for p in m.parameters()),
    }


def status(name: str) -> float:
    """A figure of ``/proc/self/status`` in GB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / GB
    raise RuntimeError(f"This system does not tell {name}: the benchmark needs Linux.")


def main() -> None:
    """Writes the run, imports it as each class in a process of its own, and writes the record."""
    parser = harness.parser("import", __doc__)
    parser.add_argument("--folder", type=Path, help="of a run that is there (None: one is written)")
    parser.add_argument("--one", help="measure one class here and print the figures")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.folder, arguments.one)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.folder is None:
            write_run(folder)
        file = folder / "model_400000.pth"
        rows = []
        for model_class in ("HookedTransformer", "TransformerBridge"):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.released_import"]
            command += ["--folder", str(folder), "--one", model_class]
            rows.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            )
        sizes = {
            "file_gb": round(file.stat().st_size / GB, 2),
            "on_disk_gb": round(file.stat().st_blocks * 512 / GB, 2),
        }
    harness.write(arguments.out, {"run": sizes, "imports": rows}, "released_import")


if __name__ == "__main__":
    main()
