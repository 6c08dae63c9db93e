"""Pieces of the page as HTML: whether the API is there, the model card, an answer, what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fathom.client.answer import Answer
from fathom.client.http import ApiError, Away, Broken, Busy, KeyRefused
from fathom.client.markup import count, esc, plural
from fathom.client.status import Status
from fathom.client.wire import Model

SHORT = {
    "unknown": "looking",
    "ready": "ready",
    "waiting": "getting ready",
    "away": "not there",
    "key": "key refused",
    "failed": "failing",
}
WAY_OUT: tuple[tuple[type[ApiError], str], ...] = (
    (Away, "Start it with <code>fathom serve RUN</code>. This page looks again every few seconds, by itself."),
    (KeyRefused, "Start the page with the right one: <code>FATHOM_API_KEY=... fathom client</code>."),
    (Busy, "Nothing is lost: send it again then."),
    (Broken, "What came before stays."),
)


def header(status: Status, url: str) -> str:
    """The title, the API's state, and what stands in the way."""
    name = esc(status.model.id) if status.model else "Fathom"
    pill = f'<span class="fx-pill fx-{status.state}" role="status"><i></i>{SHORT[status.state]}</span>'
    told = f'<header class="fx-header"><div><p class="fx-eyebrow">Fathom</p><h1>{name}</h1></div>{pill}</header>'
    return told if status.state in ("ready", "unknown") else told + obstacle(status, url)


def obstacle(status: Status, url: str) -> str:
    """What keeps the API from answering, and the way out."""
    if status.state == "waiting":
        reason = f"The API at {url} is there, and its model does not answer yet: {status.reason.rstrip('.')}."
        return notice(reason, "This page looks again every few seconds, by itself.", "busy")
    kind = {"away": Away, "key": KeyRefused}.get(status.state)
    return notice(status.reason, next((way for error, way in WAY_OUT if error is kind), ""))


def notice(message: str, way_out: str = "", kind: str = "error") -> str:
    """A box with what is wrong and, as HTML, what to do about it."""
    return f'<div class="fx-notice fx-is-{kind}" role="alert"><p>{esc(message)}</p><p>{way_out}</p></div>'


def problem(error: ApiError) -> str:
    """An error, and the way out."""
    way = next((way for kind, way in WAY_OUT if isinstance(error, kind)), "")
    return notice(str(error), way, "busy" if isinstance(error, Busy) else "error")


def card(model: Model | None) -> str:
    """The model card. Figures that the server does not tell are left out."""
    if model is None:
        return '<p class="fx-note">Here will stand what the model is made of.</p>'
    d = model.fathom
    rows: list[tuple[str, str | None, str]] = [("Window", _number(model.max_model_len), "tokens, answer included")]
    if d is not None:
        moe = f"in {len(d.moe_layers)} of {plural(d.num_hidden_layers or 0, 'layer')}"
        experts = f"{d.num_experts_per_tok} of {d.n_routed_experts}" if d.moe_layers else "none: dense"
        rows = [
            ("Parameters", None if d.parameters is None else count(d.parameters), _active(d.active_parameters)),
            ("Experts", experts, moe if d.moe_layers else plural(d.num_hidden_layers or 0, "layer")),
            ("Cache", _bytes(d.cache_bytes_per_token), "a token"),
            *rows,
            ("MTP", plural(d.num_nextn_predict_layers, "depth") if d.num_nextn_predict_layers else "none", ""),
            ("Validation loss", None if d.val_loss is None else f"{d.val_loss:.4f}", "nats a token"),
            ("Step", _number(d.step or None), "of training"),
            (
                "Runs as",
                " ".join(filter(None, (d.quantization or d.dtype,))) or None,
                f"on {d.device}" if d.device else "",
            ),
        ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{esc(value)}</dd><dd>{esc(more)}</dd></div>"
        for name, value, more in rows
        if value is not None
    )
    return f'<dl class="fx-card">{cells}</dl>'


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _active(number: int | None) -> str:
    return "" if number is None else f"{count(number)} active a token"


def _bytes(number: int | None) -> str | None:
    if number is None:
        return None
    return f"{number:,} B" if number < 10_240 else f"{number / 1024:,.1f} KiB"


def continuation(prompt: str, text: str, running: bool) -> str:
    """A prompt with what the model wrote after it."""
    caret = '<i class="fx-caret"></i>' if running else ""
    return f'<div class="fx-answer"><span class="fx-prompt">{esc(prompt)}</span><span>{esc(text)}</span>{caret}</div>'


def conversation(messages: Sequence[Mapping[str, str]], running: bool = False) -> str:
    """Turns of a chat; the last one may still grow."""
    if not messages:
        return (
            '<div class="fx-chat"><p class="fx-note">A base model sees a dialogue and writes its next lines.</p></div>'
        )
    turns = []
    for message in messages:
        who = "You" if message["role"] == "user" else "Model"
        turns.append(f'<div class="fx-turn fx-{who.lower()}"><b>{who}</b><p>{esc(message["content"])}</p></div>')
    if running:
        turns[-1] = turns[-1].removesuffix("</p></div>") + '<i class="fx-caret"></i></p></div>'
    return f'<div class="fx-chat" role="log">{"".join(turns)}</div>'


def progress(answer: Answer, seed: int | None, running: bool) -> str:
    """One line about an answer; a box if something stopped it."""
    if answer.error is not None:
        came = f'<p class="fx-facts">{" · ".join(_facts(answer, seed))}</p>' if answer.tokens else ""
        return problem(answer.error) + came
    if running and not answer.tokens:
        return '<p class="fx-facts fx-busy-line">waiting for the first token</p>'
    return f'<p class="fx-facts">{" · ".join(_facts(answer, seed, running))}</p>'


def _facts(answer: Answer, seed: int | None, running: bool = False) -> list[str]:
    facts = [plural(answer.tokens, "token")]
    if answer.speed is not None:
        facts.append(f"{answer.speed:,.0f} a second")
    if answer.stopped:
        facts.append("stopped by you")
    elif not running and answer.error is None:
        ends = {"length": "max length reached", "stop": "ended by the model"}
        facts.append(ends.get(answer.finish_reason or "", answer.finish_reason or "ended"))
    usage = answer.usage
    if usage is not None and (details := usage.completion_tokens_details) is not None:
        accepted, rejected = details.accepted_prediction_tokens or 0, details.rejected_prediction_tokens or 0
        if accepted + rejected:
            facts.append(f"{accepted:,} of {plural(accepted + rejected, 'MTP draft')} accepted")
    if usage is not None and usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens:
        facts.append(f"{usage.prompt_tokens_details.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens cached")
    if answer.left_out:
        facts.append(f"{plural(answer.left_out, 'older turn')} left out")
    facts.append("greedy" if seed is None else f"seed {seed}")
    return [esc(fact) for fact in facts]
