"""`raybooth pocket draw | pretrain | evaluators | report | path`: the embedded base, its world."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WORK = Path(".raybooth") / "pocket"


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `pocket` and its subcommands; each parser's `run(args)` gives the exit code."""
    pocket = subparsers.add_parser("pocket", help="the embedded base and its drawn world")
    commands = pocket.add_subparsers(dest="pocket_command", required=True)

    draw = _command(
        commands, "draw", "write pictures of a subject or of a class, from a seed", _draw
    )
    draw.add_argument(
        "--subject", metavar="SEED", help="photos of this one subject, each in another context"
    )
    draw.add_argument(
        "--class",
        dest="class_noun",
        metavar="NOUN",
        help="the class noun; without --subject: many individuals",
    )
    draw.add_argument("-n", type=int, default=5, help="how many pictures (default 5)")
    draw.add_argument("--seed", default="0", help="seed of poses and of individuals (default 0)")
    draw.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the PNG files"
    )

    train = _command(commands, "pretrain", "train the base from its seed; resumable", _pretrain)
    train.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    train.add_argument(
        "--steps",
        type=int,
        help="train steps of the denoiser, the last quarter with a decaying rate",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--init",
        metavar="shipped|DIR",
        help="start from the shipped weights, or from a base folder",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the state in the work folder"
    )
    train.add_argument(
        "--work", type=Path, default=_WORK, help=f"folder for state (default {_WORK})"
    )
    train.add_argument("-o", "--out", type=Path, help="where the base goes (default: WORK/base)")

    judges = _command(
        commands, "evaluators", "train the CLIP and the instance embedder of the world", _evaluators
    )
    judges.add_argument("--seed", type=int, default=0)
    judges.add_argument(
        "--work", type=Path, default=_WORK, help=f"folder for the corpus (default {_WORK})"
    )
    judges.add_argument("-o", "--out", type=Path, help="where both go (default: WORK/evaluators)")

    report = _command(
        commands, "report", "judge a base with a classifier trained on true renders", _report
    )
    report.add_argument("--base", type=Path, help="folder of the base (default: the shipped one)")
    report.add_argument("--prompts", type=int, default=200)
    report.add_argument("--device", choices=("cpu", "cuda"), default="cpu")

    _command(commands, "path", "print the folder of the shipped base", _path)


def _command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _draw(args: argparse.Namespace) -> int:
    from raybooth.errors import InputError
    from raybooth.pocket import world

    if args.n < 1:
        raise InputError("cannot draw so few pictures", f"-n {args.n}", "ask for at least 1")
    if args.class_noun is not None and args.class_noun not in world.CLASSES:
        raise InputError(
            "no such class noun in the pocket world",
            args.class_noun,
            f"choose one of {', '.join(world.CLASSES)}",
        )
    if args.subject is not None:
        subject = world.draw_instance(args.subject, args.class_noun, fancy=True)
        pictures = world.subject_photos(subject, args.n, args.seed)
    else:
        instances = [
            world.draw_instance(f"{args.seed}/{i}", args.class_noun) for i in range(args.n)
        ]
        pictures = [
            world.subject_photos(one, 1, f"{args.seed}/{i}")[0] for i, one in enumerate(instances)
        ]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(pictures):
        one.save(args.out / f"{i:02d}.png")
    print(args.out)
    return 0


def _pretrain(args: argparse.Namespace) -> int:
    import os
    from dataclasses import replace

    from raybooth import pocket
    from raybooth.errors import InputError
    from raybooth.pocket.pretrain import PretrainConfig, gpu_config, pretrain

    if args.device == "cuda":
        config = gpu_config(args.seed)
    else:
        config = PretrainConfig(seed=args.seed, processes=min(2, os.cpu_count() or 1))
    if args.steps is not None:
        if args.steps < 4:
            raise InputError(
                "cannot train so briefly", f"--steps {args.steps}", "ask for at least 4"
            )
        loop = replace(config.denoiser.loop, steps=args.steps, decay_steps=args.steps // 4)
        config = replace(config, denoiser=replace(config.denoiser, loop=loop))
    if args.init is not None:
        init = pocket.path() if args.init == "shipped" else Path(args.init)
        if not (init / "model_index.json").exists():
            raise InputError(
                "no base to start from",
                str(init),
                "give `shipped` or a folder with a model_index.json",
            )
        config = replace(config, init=init)
    out = args.out or args.work / "base"
    record = pretrain(config, out, args.work, args.resume)
    print(json.dumps(record["stages"], indent=2), file=sys.stderr)
    print(out)
    return 0


def _evaluators(args: argparse.Namespace) -> int:
    from raybooth.pocket.evaluators import EvaluatorsConfig, train_evaluators

    out = args.out or args.work / "evaluators"
    record = train_evaluators(EvaluatorsConfig(seed=args.seed), args.work, out)
    print(json.dumps({name: record[name] for name in ("embedder", "clip")}, indent=2))
    print(out)
    return 0


def _report(args: argparse.Namespace) -> int:
    from raybooth import pocket
    from raybooth.errors import InputError
    from raybooth.pocket.report import ReportConfig, write_report

    folder = args.base or pocket.path()
    if not (folder / "model_index.json").exists():
        raise InputError("no base to judge", str(folder), "give a folder with a model_index.json")
    print(
        json.dumps(
            write_report(folder, ReportConfig(prompts=args.prompts, device=args.device)), indent=2
        )
    )
    return 0


def _path(args: argparse.Namespace) -> int:
    from raybooth import pocket

    print(pocket.path())
    return 0
