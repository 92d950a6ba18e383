"""The whole job and the training step on one GPU, beside plain Flax and PyTorch, in one run.

``python -m benchmarks.gpu`` takes less than eight minutes, needs nothing beyond the library's own
packages and PyTorch, and keeps a table of each of three things in ``benchmarks/results``, with all
that was measured.

* The job: ``train.py --epochs N`` with an empty cache of compiled programs, and once more with what
  the first left there; its parts by the lines that it prints.
* Throughput: many steps are started and waited for once; batches lie on the device. PyTorch has
  channels_last, fused SGD, TF32, and automatic mixed precision in bfloat16.
* Kernels: microseconds a step by kind, of our step, from a trace.
"""

import argparse
import collections
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS, ROOT, Table, machine, versions

SECTIONS = ("job", "throughput", "kernels")
STEPS = 8  # in a program
WARM_UP, ROUNDS = 2, 3
JOB_SECONDS = 120.0
TORCH = {"PyTorch eager": None, "PyTorch reduce-overhead": "reduce-overhead"}
TORCH |= {"PyTorch max-autotune": "max-autotune"}
KINDS = {
    "memory": ("memcpy", "memset"),
    "layout": ("nchwto", "nhwcto", "tonhwc", "tonchw", "transpose"),
    "convolution": ("conv", "cudnn", "xmma", "cutlass", "gemm", "nvjet", "sm80", "sm90"),
    "pooling": ("window", "scatter", "pool"),
    "reduction": ("reduc",),
}

Case = dict[str, Any]
# The most informative first: what does not fit into --seconds is left out, and said.
CASES: list[Case] = [
    {"model": model, "dtype": dtype, "batch": batch, "size": size, "contender": contender}
    for model, dtype, batch, size in (
        ("resnet18", "bfloat16", 256, 96),
        ("resnet18", "float32", 256, 96),
        ("resnet50", "bfloat16", 256, 224),
        ("resnet18", "bfloat16", 1024, 96),
    )
    for contender in ("resnet_flax", "PyTorch reduce-overhead")
]
CASES += [
    {**CASES[0], "dtype": dtype, "contender": contender}
    for contender in ("plain Flax", "PyTorch eager", "PyTorch max-autotune")
    for dtype in ("bfloat16", "float32")
]


def main() -> None:
    """Runs the sections, each contender in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--seconds", type=float, default=460, help="for all (default: 460)")
    parser.add_argument("--epochs", type=int, default=10, help="of the job (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on any machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the tables' folder")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    device = device_name()
    if device is None and not options.tiny:
        print("benchmarks.gpu: no GPU that JAX can use: --tiny rehearses here", file=sys.stderr)
        sys.exit(2)
    until = time.perf_counter() + options.seconds
    print(device or machine(), json.dumps(versions()), flush=True)
    rows: dict[str, list[Case]] = {section: [] for section in SECTIONS}

    def note(section: str, row: Case) -> None:
        rows[section].append(row)
        print(json.dumps(row), flush=True)

    if "throughput" in options.only:
        for case in CASES[:1] if options.tiny else CASES[:4]:
            note("throughput", run_case(case, until, options.tiny))
    if "kernels" in options.only:
        note("kernels", run_case({**CASES[0], "trace": True}, until, options.tiny))
    if "job" in options.only:
        for row in run_job(options.epochs, options.tiny, until):
            note("job", row)
    if "throughput" in options.only and not options.tiny:
        for case in CASES[4:]:
            note("throughput", run_case(case, until, options.tiny))
    for section, (name, as_table) in TABLES.items():
        if rows[section]:
            print()
            path = options.output / f"{name}.json"
            as_table(rows[section]).keep(path, machine=device or machine(), measured=rows[section])


def run_case(case: Case, until: float, tiny: bool) -> Case:
    """Measures in a process of its own, for as long as there is time."""
    seconds = min(until - time.perf_counter(), 110)
    if seconds < 20:
        return {**case, "left_out": "no time left"}
    if tiny:
        case = {**case, "batch": 8, "size": 32, "dtype": "float32", "tiny": True}
    command = [sys.executable, "-m", "benchmarks.gpu", "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        return {**case, **json.loads(done.stdout.strip().splitlines()[-1])}
    except subprocess.TimeoutExpired:
        return {**case, "left_out": f"not done after {seconds:.0f} s"}
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {**case, "left_out": lines[-1][:300]}


def run_job(epochs: int, tiny: bool, until: float) -> list[Case]:
    """Runs ``train.py`` cold and warm; its parts are told by the lines it prints.

    What takes too long is killed. Of a job that fails, the last lines are kept, and those in which
    XLA says why it ended the process.
    """
    marks = {"compiling the training step": "start", "compiled in": "compile"}
    marks |= {"epoch 1/": "first epoch", "drawing pictures": "other epochs"}
    rows: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--train-examples", "300", "--test-examples", "50", "--image-size", "28"]
        command = [sys.executable, str(ROOT / "train.py"), "--epochs", str(epochs)]
        for name in ("cold", "warm"):
            environment = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
            started = last = time.perf_counter()
            parts, lines = {}, []
            with subprocess.Popen(
                [*command, "--run-dir", f"{folder}/{name}", *(flags if tiny else ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            ) as process:
                assert process.stdout
                left = min(JOB_SECONDS, until - time.perf_counter())
                timer = threading.Timer(left, process.kill)
                timer.daemon = True  # at Ctrl-C nothing waits for it
                timer.start()
                for line in process.stdout:
                    lines.append(line.strip())
                    for mark, part in marks.items():
                        if line.startswith(mark):
                            now = time.perf_counter()
                            parts[part], last = round(now - last, 1), now
            timer.cancel()
            reasons = [line for line in lines if "Check failed" in line]
            ended = time.perf_counter()
            parts["results"] = round(ended - last, 1)
            rows.append(
                {
                    "exit_code": process.returncode,
                    "job": name,
                    "epochs": epochs,
                    "seconds": round(ended - started, 1),
                    "first_step": round(parts.get("start", 0) + parts.get("compile", 0), 1),
                    "parts": parts,
                    "ends_with": lines[-2:] if process.returncode == 0 else reasons + lines[-30:],
                }
            )
    return rows


def measure(case: Case) -> Case:
    """Images per second of one contender: the median and the range of some rounds."""
    if case["contender"] in TORCH:
        call, images = torch_steps(case)
    else:
        call, images = jax_steps(case)
    started = time.perf_counter()
    for _ in range(WARM_UP):
        call(1)
    ready = time.perf_counter() - started
    calls = 1 if case.get("tiny") else max(2, int(1.0 / call(2) * 2))
    if case.get("trace"):
        return {"ready_seconds": round(ready, 1), "kernels": trace(call, images // case["batch"])}
    rates = sorted(calls * images / call(calls) for _ in range(ROUNDS))
    return {
        "images_per_second": round(rates[ROUNDS // 2]),
        "range": [round(rates[0]), round(rates[-1])],
        "ready_seconds": round(ready, 1),
    }


def jax_steps(case: Case) -> tuple[Callable[[int], float], int]:
    """Calls of a program of several steps; returns a function that times them, and its images."""
    from resnet_flax.machine.runtime import configure_runtime

    configure_runtime()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from resnet_flax.nn.preprocessing import prepare_images
    from resnet_flax.nn.resnet import build_model
    from resnet_flax.training import Images, Metrics, create_train_state, train_steps

    size, batch, steps = case["size"], case["batch"], 1 if case.get("tiny") else STEPS
    data = Images.place(*random_set(case))
    random = np.random.default_rng(0)
    orders = [
        jax.device_put(random.integers(0, len(data.labels), (steps, batch)).astype(np.int32))
        for _ in range(4)
    ]
    model: Any = build_model(case["model"], dtype=case["dtype"])
    if case["contender"] == "plain Flax":
        from benchmarks.plain_flax import PlainResNet

        bottleneck = model.block.__name__ == "Bottleneck"
        model = PlainResNet(model.stage_sizes, bottleneck, jnp.dtype(case["dtype"]))

        def plain_step(index: Any, reached: Any, order: Any, data: Images) -> Any:
            state, total = reached
            images = prepare_images(data.images[order[index]], size)

            def loss(params: Any) -> Any:
                logits, updates = model.apply(
                    {"params": params, "batch_stats": state.batch_stats},
                    images,
                    True,
                    mutable=["batch_stats"],
                )
                labels = data.labels[order[index]]
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return losses.mean(), updates["batch_stats"]

            value, gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
            state = state.apply_gradients(grads=gradients, batch_stats=value[1])
            return state, total + value[0]

        def run(state: Any, sums: Any, data: Images, order: Any) -> Any:
            step = partial(plain_step, order=order, data=data)
            return jax.lax.fori_loop(0, steps, step, (state, sums))

        sums: Any = jnp.float32(0)
    else:
        run = partial(train_steps, count=steps, image_size=size)
        sums = Metrics.empty()
    first = (data.images[:batch], data.labels[:batch])
    if case["contender"] == "plain Flax":
        from resnet_flax.training import TrainState

        shape = jnp.zeros((1, size, size, data.images.shape[-1]))
        variables = jax.jit(partial(model.init, train=True))(jax.random.key(0), shape)
        state = TrainState.create(
            apply_fn=model.apply, tx=optax.sgd(0.05), seed=jnp.uint32(0), **variables
        ).replace(step=jnp.int32(0))
    else:
        state = create_train_state(model, optax.sgd(0.05), first)
    program = jax.jit(run, donate_argnums=0)
    reached = (state, sums)

    def call(count: int) -> float:
        nonlocal reached
        started = time.perf_counter()
        for index in range(count):
            reached = program(reached[0], reached[1], data, orders[index % len(orders)])
        jax.block_until_ready(reached[1])
        return time.perf_counter() - started

    return call, steps * batch


def torch_steps(case: Case) -> tuple[Callable[[int], float], int]:
    """The same for the PyTorch reference; its images are resized and scaled beforehand."""
    import torch

    from resnet_flax.nn.resnet import build_model
    from tests.support.torch_reference import TorchvisionResNet, d2l_init

    ours, size, batch = build_model(case["model"]), case["size"], case["batch"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    channels = 3 if size == 224 else 1
    fields: Any = {"bias": True, "norm_shortcut": False}
    fields["bottleneck"] = ours.block.__name__ == "Bottleneck"
    network: Any = d2l_init(TorchvisionResNet(ours.stage_sizes, channels, 10, **fields))
    network = network.to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, fused=device.type == "cuda")
    mode = TORCH[case["contender"]]
    compiled = torch.compile(network, mode=mode) if mode else network
    batches = [
        (
            torch.rand(batch, channels, size, size, device=device).to(
                memory_format=torch.channels_last
            ),
            torch.randint(10, (batch,), device=device),
        )
        for _ in range(4)
    ]
    mixed = case["dtype"] == "bfloat16"

    def step(index: int) -> Any:
        images, labels = batches[index % len(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(compiled(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    def call(count: int) -> float:
        started = time.perf_counter()
        for index in range(count * STEPS):
            loss = step(index)
        loss.item()
        return time.perf_counter() - started

    return call, STEPS * batch


def random_set(case: Case) -> tuple[Any, Any]:
    """A data set of random pixels: 28x28 and grey, or coloured of the size that is asked for."""
    import numpy as np

    random = np.random.default_rng(0)
    shape = (2000, 224, 224, 3) if case["size"] == 224 else (60_000, 28, 28, 1)
    if case.get("tiny"):
        shape = (100, 28, 28, 1)
    labels = random.integers(0, 10, shape[0]).astype(np.int32)
    return random.integers(0, 256, shape, np.uint8), labels


def trace(call: Callable[[int], float], steps: int) -> Case:
    """Microseconds a step by kind of kernel, and the longest kernels, from JAX's profiler."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call(2)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as content:
            events = json.load(content)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"
    }
    kinds: collections.Counter[str] = collections.Counter()
    longest: collections.Counter[str] = collections.Counter()
    count = 0
    for event in events:
        on_gpu = "GPU" in processes.get(event.get("pid"), "")
        stream = threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and on_gpu and stream.startswith("Stream"):
            name = event["name"].lower()
            words = ((kind, word) for kind, found in KINDS.items() for word in found)
            kind = next((kind for kind, word in words if word in name), "elementwise")
            kinds[kind] += event["dur"] / (2 * steps)
            longest[event["name"][:80]] += event["dur"] / (2 * steps)
            count += 1
    return {
        "microseconds": round(sum(kinds.values())),
        "kinds": {kind: round(value) for kind, value in kinds.most_common()},
        "longest": {name: round(value, 1) for name, value in longest.most_common(12)},
        "kernels_a_step": round(count / (2 * steps)),
    }


def device_name() -> str | None:
    """The GPU's name, from a process of its own: this one leaves the memory to the contenders."""
    program = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    platform, _, kind = done.stdout.strip().partition(" ")
    return kind if platform in ("gpu", "cuda", "rocm") else None


def network(row: Case) -> str:
    """What is trained: the heading of a column."""
    return f"{row['model']}, {row['batch']} of {row['size']}x{row['size']}, {row['dtype']}"


def throughput_table(rows: list[Case]) -> Table:
    """Images per second, the median and the range, or why there are none."""
    cells = {}
    for row in rows:
        figures = row.get("left_out", "")
        if "range" in row:
            low, high = row["range"]
            figures = f"{row['images_per_second']:,} ({low:,}-{high:,})"
        cells[row["contender"], network(row)] = figures
    networks = dict.fromkeys(map(network, rows))
    table = Table("images/s", *networks)
    for contender in dict.fromkeys(row["contender"] for row in rows):
        table.add(contender, *(cells.get((contender, each), "") for each in networks))
    return table


def kernels_table(rows: list[Case]) -> Table:
    """Microseconds of a step by kind of kernel, or why there are none."""
    (row,) = rows
    table = Table(f"kernels, {network(row)}", "microseconds a step")
    if "left_out" in row:
        table.add("all", row["left_out"])
        return table
    for kind, value in row["kernels"]["kinds"].items():
        table.add(kind, str(value))
    table.add("all", str(row["kernels"]["microseconds"]))
    return table


def job_table(rows: list[Case]) -> Table:
    """Seconds of the job and of its parts."""
    names = list(rows[0]["parts"])
    table = Table("job", *names, "whole, s")
    for row in rows:
        failed = f", failed with exit code {row['exit_code']}" if row["exit_code"] else ""
        parts = (str(row["parts"].get(name, "")) for name in names)
        table.add(row["job"] + failed, *parts, str(row["seconds"]))
    return table


# Section -> its file, and how its figures become a table.
TABLES = {
    "throughput": ("gpu", throughput_table),
    "kernels": ("gpu_kernels", kernels_table),
    "job": ("gpu_job", job_table),
}

if __name__ == "__main__":
    main()
