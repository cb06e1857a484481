"""``elf-rt serve``: a model behind HTTP."""

from pathlib import Path

import click

from elf_rt.commands.options import backend_options, bundle_argument
from elf_rt.errors import InputError
from elf_rt.libraries import needs


@click.command("serve")
@bundle_argument
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0: any free one.")
@backend_options
@click.option("--max-rows", type=click.IntRange(1), help="Of one network call.  [default: as many as pay]")
@click.option("--max-waiting", type=click.IntRange(0), default=256, help="Texts behind those in flight; then 429.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False), help="One key a line; requests must bear one."
)
@click.option("--root-path", default="", help="Where a proxy shows this server, such as /elf.")
@click.option("--cors-origin", "origins", multiple=True, help="A page's origin that may ask; may be given again.")
@click.option("--log-json", is_flag=True, help="Log lines are JSON objects.")
@click.option("--log-prompts", is_flag=True, help="Prompts are logged, too.")
def command(
    bundle: Path,
    host: str,
    port: int,
    backend: str,
    precision: str,
    threads: int | None,
    max_rows: int | None,
    max_waiting: int,
    api_key_file: Path | None,
    root_path: str,
    origins: tuple[str, ...],
    log_json: bool,
    log_prompts: bool,
) -> None:
    """Serve BUNDLE (by default the only *.elfrt folder here): OpenAI's completions, drafts, metrics, and a page."""
    with needs("serve", "pip install 'elf-rt[serve]'"):
        from elf_rt.serve.app import create_app
        from elf_rt.serve.boundary import log_to_stderr
        from elf_rt.serve.job import Service
        from elf_rt.serve.server import listen, run
    from elf_rt.model import load

    keys = _read_keys(api_key_file)
    with (
        listen(host, port) as bound,
        load(bundle, backend, precision=precision, threads=threads, max_rows=max_rows) as model,
    ):
        log_to_stderr(log_json)
        service = Service(model, max_waiting=max_waiting, log_prompts=log_prompts)
        app = create_app(service, keys=keys, origins=origins, root_path=root_path)
        run(app, service.gate, model, bound, root_path)


def _read_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8") from error
    if not keys:
        raise InputError(f"{path} holds no key")
    return keys
