"""langchain-openai: chat models and completion models, whole, streamed, in batches, and asynchronously."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from common import MODEL, OPEN, Checks
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

check = Checks()
base = {"base_url": f"{OPEN}/v1", "api_key": "none", "model": MODEL, "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(**base, max_completion_tokens=12)
said = [SystemMessage("Be brief."), HumanMessage("Who?"), AIMessage("We."), HumanMessage("And why?")]

answer = chat.invoke(said)
check("ChatOpenAI.invoke", isinstance(answer.content, str) and answer.content, repr(answer.content))
check("usage_metadata", answer.usage_metadata["output_tokens"] <= 12, answer.usage_metadata["total_tokens"])
pieces = list(chat.stream(said, stream_usage=True))
check("ChatOpenAI.stream", "".join(str(p.content) for p in pieces) == answer.content, f"{len(pieces)} pieces")
check("ChatOpenAI.batch", len(chat.batch([said, said[:2]])) == 2)
told = chat.bind(logprobs=True, top_logprobs=2).invoke(said).response_metadata["logprobs"]["content"]
check("logprobs", len(told[0]["top_logprobs"]) == 2)
parts = chat.invoke([HumanMessage([{"type": "text", "text": "Who?"}])])
check("content in parts", isinstance(parts.content, str))
writer = OpenAI(**base, max_tokens=12)
text = writer.invoke("The state of")
check("OpenAI.invoke", isinstance(text, str) and text, repr(text))
check("OpenAI.stream", "".join(writer.stream("The state of")) == text)
check("OpenAI.batch", writer.batch(["The state of"] * 3) == [text] * 3)
check("OpenAI.generate", len(writer.generate(["The state of", "We the"]).generations) == 2)
check("stop", "e" not in writer.invoke("The state of", stop=["e"]))


async def later() -> str:
    """Streamed in an event loop."""
    return "".join([str(piece.content) async for piece in chat.astream(said)])


check("ChatOpenAI.astream", asyncio.run(later()) == answer.content)
check.end(f"langchain-openai {version('langchain-openai')}")
