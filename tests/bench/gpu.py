"""One NVIDIA GPU, one table, under eight minutes: `python -m tests.bench.gpu`.

Needs torch 2.11 or later, diffusers, transformers, safetensors, numpy, pillow and pydantic; no
network, no Ray, no checkpoint (weights are random; PEFT's row is left out where peft is not
installed). `--device cpu --tiny` runs every part of it on small shapes. Rows are measured in turn:
each warms up, then runs train steps until its share of the time is spent. `--out FILE` keeps the
table.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from raybooth.fleet.memory import SlotShape, pack_tensor_bytes
from raybooth.fleet.shortage import is_out_of_memory
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.lora import PRESETS, find_sites, init_pair
from raybooth.model.sampler import SampleRequest, denoise_step, row_image, start_row
from raybooth.training.pack import Pack
from tests.bench.gpu_meter import Meter
from tests.bench.gpu_shapes import (
    MODELS,
    TINY_MODELS,
    Model,
    conditioning,
    make_base,
    make_job,
    make_unet,
    shape_of,
)

ROOT = Path(__file__).parents[2]
LIMIT_S = 450.0
PACKS = (1, 2, 4, 8, 16)
RANK, ROWS = 4, 2
SUBJECTS = 8
DENOISE_STEPS = 10
PROCESSES = 4


class Table:
    """Lines as they come, and all of them again in a file."""

    HEAD = ("model", "side", "what", "units/s", "ratio", "predicted", "allocated", "error", "MFU")
    WIDTHS = (10, 5, 40, 9, 6, 10, 10, 6, 5)

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.add(*self.HEAD)

    def add(self, *cells: str) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self.WIDTHS, strict=False)]
        self.lines.append("  ".join(padded).rstrip())
        print(self.lines[-1], flush=True)


class Bench:
    """All rows, on one device, within one limit of time."""

    def __init__(self, device: str, *, tiny: bool, limit_s: float) -> None:
        self.device, self.tiny = device, tiny
        self.models = TINY_MODELS if tiny else MODELS
        self.packs = PACKS[:2] if tiny else PACKS
        self.meter = Meter(device, row_s=0.0 if tiny else 2.0)
        self.ends = time.monotonic() + limit_s
        self.dtype = torch.bfloat16
        self.table = Table()

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            for model in self.models:
                base = make_base(model, self.device, self.dtype, Path(name), tiny=self.tiny)
                for side in model.sides:
                    self._train(model, base, side)
                self._peft(model, model.sides[0])
                self._serve(model, base, model.sides[0])
                if model is self.models[0]:
                    self._processes(model, base, model.sides[0])
                del base
                self.meter.free()

    # training

    def _train(self, model: Model, base: Base, side: int) -> None:
        alone: float | None = None
        flops = _row_flops(model, side // base.vae_scale_factor)
        for count in self.packs:
            what = f"pack of {count}, {ROWS * count} rows"
            if self._is_late(model, side, what):
                return
            checkpointing = self._predict(base, side, count, False) > self.meter.room_bytes()
            what += ", checkpointed" if checkpointing else ""
            predicted = self._predict(base, side, count, checkpointing)
            if predicted > 1.2 * self.meter.room_bytes():
                self.table.add(model.name, str(side), what, "-", "-", _size(predicted), "no room")
                return
            try:
                per_s, allocated = self._pack(model, base, side, count, checkpointing)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.table.add(model.name, str(side), what, "-", "-", _size(predicted), "OOM")
                self.meter.free()
                return
            alone = alone or per_s
            self.table.add(
                model.name,
                str(side),
                what,
                f"{per_s:.3g}",
                f"{per_s / alone:.2f}",
                _size(predicted),
                _size(allocated) if allocated else "-",
                f"{predicted / allocated - 1:+.0%}" if allocated else "-",
                self.meter.mfu(flops * ROWS * per_s),
            )

    def _pack(
        self, model: Model, base: Base, side: int, count: int, checkpointing: bool
    ) -> tuple[float, int]:
        """(subject-steps/s, bytes beside the base at the peak; 0 without CUDA)."""
        self.meter.free()
        jobs = [
            make_job(model, base, side, i, precision="bf16", checkpointing=checkpointing)
            for i in range(count)
        ]
        before = self.meter.start_counting()
        pack = Pack(base, jobs)
        try:
            per_s = count * self.meter.rate(pack.step)
            return per_s, self.meter.peak_bytes() - before if before is not None else 0
        finally:
            pack.close()
            del pack
            self.meter.free()

    def _predict(self, base: Base, side: int, count: int, checkpointing: bool) -> int:
        return pack_tensor_bytes(
            shape_of(base),
            [SlotShape(RANK, ROWS)] * count,
            targets=PRESETS["attention"],
            resolution=side,
            precision="bf16",
            gradient_checkpointing=checkpointing,
            on_gpu=self.device != "cpu",
        )

    def _peft(self, model: Model, side: int) -> None:
        """The inner loop of diffusers' LoRA script: one subject, latents and text cached."""
        what = "diffusers + PEFT, one subject"
        if importlib.util.find_spec("peft") is None:
            self.table.add(model.name, str(side), what, "-", "-", "peft is not installed")
            return
        if self._is_late(model, side, what):
            return
        from peft import LoraConfig

        unet = make_unet(model, self.device, self.dtype).requires_grad_(False)
        targets = list(PRESETS["attention"])
        unet.add_adapter(
            LoraConfig(
                r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets
            )
        )
        parameters = [p for p in unet.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(parameters, lr=5e-4, fused=True)
        latent = side // 8
        text = {k: v.to(self.device, self.dtype) for k, v in conditioning(model, ROWS).items()}
        states = text.pop("encoder_hidden_states")
        added = None
        if model.pooled:
            sizes = torch.tensor([[side, side, 0, 0, side, side]] * ROWS, device=self.device)
            added = {**text, "time_ids": sizes}

        def step() -> None:
            x0 = torch.randn(ROWS, 4, latent, latent, device=self.device)
            noise = torch.randn_like(x0)
            t = torch.randint(0, 1000, (ROWS,), device=self.device)
            with torch.autocast(self.device, dtype=self.dtype):
                found = unet(x0 + noise, t, states, added_cond_kwargs=added).sample
            error = (found.float() - noise).square().mean((1, 2, 3))
            optimizer.zero_grad()
            (error[0] + error[1]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        before = self.meter.start_counting()
        per_s = self.meter.rate(step)
        allocated = _size(self.meter.peak_bytes() - before) if before is not None else "-"
        self.table.add(model.name, str(side), what, f"{per_s:.3g}", "", "", allocated)

    def _processes(self, model: Model, base: Base, side: int) -> None:
        """Packs of one in separate processes, against one pack of as many."""
        count = 2 if self.tiny else PROCESSES
        what = f"{count} processes, one subject each"
        if self._is_late(model, side, what, needs_s=60.0):
            return
        command = [sys.executable, "-m", "tests.bench.gpu", "--device", self.device]
        command += ["--solo", *(["--tiny"] if self.tiny else [])]
        running = [
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        try:
            for process in running:  # each says that it is warm, and waits for the word
                assert process.stdout is not None
                process.stdout.readline()
            for process in running:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            answers = [process.communicate(timeout=120)[0].split() for process in running]
            if not all(answers):
                self.table.add(model.name, str(side), what, "-", "-", "a process died")
                return
            per_s = sum(float(words[-1]) for words in answers)
        finally:
            for process in running:
                process.kill()
                process.wait()
        packed, _ = self._pack(model, base, side, count, False)
        self.table.add(model.name, str(side), what, f"{per_s:.3g}", f"{per_s / packed:.2f}")
        one = f"one process, pack of {count} (right after)"
        self.table.add(model.name, str(side), one, f"{packed:.3g}", "1.00")

    def solo(self) -> None:
        """What a separate process does: warm up, wait for a line, train, print subject-steps/s."""
        model = self.models[0]
        with tempfile.TemporaryDirectory() as name:
            base = make_base(model, self.device, self.dtype, Path(name), tiny=self.tiny)
            side = model.sides[0]
            job = make_job(model, base, side, 0, precision="bf16", checkpointing=False)
            pack = Pack(base, [job])
            for _ in range(2):
                pack.step()
            self.meter.wait()
            print("warm", flush=True)
            sys.stdin.readline()
            print(self.meter.rate(pack.step, warm_up=0, seconds=2 * self.meter.row_s), flush=True)

    # serving

    def _serve(self, model: Model, base: Base, side: int) -> None:
        """Eight requests of eight subjects: one batch, against one adapter written at a time."""
        if self._is_late(model, side, "serving", needs_s=30.0):
            return
        subjects = 2 if self.tiny else SUBJECTS
        steps = 2 if self.tiny else DENOISE_STEPS
        sites = find_sites(base.denoiser, "attention")
        generator = torch.Generator().manual_seed(0)
        adapters = [
            {site.key: init_pair(site, RANK, generator) for site in sites} for _ in range(subjects)
        ]
        bank = Bank(base.denoiser, sites=sites, rank=RANK, num_slots=subjects, device=base.device)
        for slot, adapter in enumerate(adapters, 1):
            bank.write(slot, adapter)
        cond, uncond = conditioning(model), conditioning(model)

        def draw(slots: list[int]) -> None:
            request = SampleRequest("", num_inference_steps=steps, height=side, width=side)
            rows = []
            for slot in slots:
                row = start_row(base, request, cond=cond, uncond=uncond)
                row.slot = slot
                rows.append(row)
            while not rows[0].done:
                denoise_step(base, bank, rows)
            for row in rows:
                row_image(base, row)

        def swapped() -> None:
            for adapter in adapters:
                bank.write(1, adapter)
                draw([1])

        def mixed() -> None:
            draw(list(range(1, subjects + 1)))

        one_by_one = subjects * self.meter.rate(swapped, warm_up=1)
        together = subjects * self.meter.rate(mixed, warm_up=1)
        bank.detach()
        name = f"images/s, {subjects} subjects, {steps} steps: "
        self.table.add(model.name, str(side), name + "swapped", f"{one_by_one:.3g}", "1.00")
        ratio = f"{together / one_by_one:.2f}"
        self.table.add(model.name, str(side), name + "mixed", f"{together:.3g}", ratio)
        self.meter.free()

    def _is_late(self, model: Model, side: int, what: str, needs_s: float = 10.0) -> bool:
        late = time.monotonic() + needs_s > self.ends
        if late:
            self.table.add(model.name, str(side), what, "-", "-", "out of time")
        return late


def _row_flops(model: Model, latent: int) -> float:
    """FLOPs of one row's train step with frozen weights: forward, and backward to the inputs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet = make_unet(model, "meta", torch.float32)
        text = {name: part.to("meta") for name, part in conditioning(model).items()}
        states = text.pop("encoder_hidden_states")
        added = {**text, "time_ids": torch.zeros(1, 6, device="meta")} if model.pooled else None
        x, t = torch.zeros(1, 4, latent, latent, device="meta"), torch.zeros(1, device="meta")
        unet(x, t, states, added_cond_kwargs=added)
    return 2.0 * counter.get_total_flops()


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes >> 20} MiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, few steps")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds in all")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    parser.add_argument("--solo", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; `--device cpu --tiny` runs the bench on small shapes")
        return 2
    bench = Bench(options.device, tiny=options.tiny, limit_s=options.limit)
    if options.solo:
        bench.solo()
        return 0
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16, rank {RANK}, {ROWS} rows a subject")
    started = time.monotonic()
    bench.run()
    print(f"{time.monotonic() - started:.0f} s")
    if options.out is not None:
        options.out.write_text("\n".join([name, *bench.table.lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
