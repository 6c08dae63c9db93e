"""`fathom client`: a page in the browser, for an API."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    api: Annotated[
        str, typer.Option("--api", envvar="FATHOM_API_URL", metavar="URL", help="The API, as `fathom serve` tells it.")
    ] = "http://127.0.0.1:5000",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes any that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; whoever reaches the page uses its API key.")
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FATHOM_API_KEY", metavar="KEY", show_default=False,
            help="Sent to the API. Better in the environment: other users of the machine see command lines.",
        ),
    ] = None,
    patience: Annotated[float, typer.Option(min=1, help="Seconds to wait for the next token.")] = 300.0,
    root_path: Annotated[str, typer.Option(help="Where a reverse proxy shows the page, such as /fathom.")] = "",
) -> None:  # fmt: skip
    """Open a page for an API: completions, chat, and which experts every token used.

    Example: fathom client --api http://127.0.0.1:5000 --port 7860
    """
    import signal

    from fathom.errors import DependencyError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as process 1 it would be ignored

    try:
        from fathom.client.app import PageConfig, run
        from fathom.client.http import ApiConfig
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fathom"):
            raise
        raise DependencyError(
            f'The page needs {error.name}, which is not installed: pip install "fathom-lm[client]"'
        ) from None
    run(
        PageConfig(host=host, port=port, root_path=root_path.rstrip("/")),
        ApiConfig(url=api, key=api_key or None, patience=patience),
    )
