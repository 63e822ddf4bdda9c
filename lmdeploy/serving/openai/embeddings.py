"""POST /v1/embeddings: the model's last hidden states of a text, pooled in the engine, as one vector of length 1 per input.

A chat model was not trained for this: its vectors say what a text is about, but less well than those of an embedding model.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from lmdeploy.errors import RequestError
from lmdeploy.messages import Response as Answer
from lmdeploy.serving.openai.errors import HttpError, read_body
from lmdeploy.serving.openai.protocol import EmbeddingRequest, PoolingRequest
from lmdeploy.serving.service import Service, service_of, together, unless_gone

#: of one request, inputs in the engine at a time; the others of a long list leave its queue to other clients
WINDOW = 64

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/embeddings", summary="Vectors of texts")
async def embeddings(request: Request) -> Response:
    """`input` is a text, a list of texts, token ids, or a list of token id lists. `pooling` is 'mean' (of all tokens; the default) or 'last'."""
    service = service_of(request)
    body = await read_body(request, EmbeddingRequest)
    service.check_model(body.model)
    size = service.frontend.spec.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        raise RequestError(f"dimensions={body.dimensions} is more than the {size} that this model has", param="dimensions")
    answers = await unless_gone(request, _embed_all(service, body))
    payload = await asyncio.to_thread(_payload, service.model_name, body, answers)
    return Response(payload, media_type="application/json")


@router.post("/pooling", include_in_schema=False)
async def pooling(request: Request) -> Response:
    """Scores of reward models; there is none that this version loads."""
    service = service_of(request)
    body = await read_body(request, PoolingRequest)
    service.check_model(body.model)
    raise RequestError("/pooling needs a reward model, and this version of lmdeploy loads none; /v1/embeddings gives vectors", code="unsupported")


async def _embed_all(service: Service, body: EmbeddingRequest) -> list[Answer]:
    """All inputs, in order; the first failure ends the others."""
    slots = asyncio.Semaphore(min(WINDOW, service.frontend.info.max_batch_size))
    return await together([_embed(service, body, text, place, slots) for place, text in enumerate(inputs_of(body))])


async def _embed(service: Service, body: EmbeddingRequest, text: str | list[int], place: int, slots: asyncio.Semaphore) -> Answer:
    if not text:
        raise RequestError(f"input.{place} is empty; give text or token ids", param="input")
    async with slots:
        ids = await service.token_ids(text)
        return await service.answer(service.frontend.prepare_embedding(ids, body.pooling or "mean"))


def inputs_of(body: EmbeddingRequest) -> list[str | list[int]]:
    """One entry per vector, whatever form they came in."""
    if isinstance(body.input, str):
        return [body.input]
    if isinstance(body.input[0], int):
        return [body.input]
    return list(body.input)


def _payload(model: str, body: EmbeddingRequest, answers: list[Answer]) -> bytes:
    tokens = sum(a.input_token_len for a in answers)
    data = [{"object": "embedding", "index": i, "embedding": _wire(_vector(a, body.dimensions), body.encoding_format)} for i, a in enumerate(answers)]
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def _vector(answer: Answer, dimensions: int | None) -> NDArray[np.float32]:
    """The vector, cut to its first `dimensions` and scaled to length 1 again."""
    assert answer.embedding is not None
    vector = np.frombuffer(answer.embedding, dtype=np.float32)[:dimensions]
    if not np.isfinite(vector).all():
        raise HttpError(500, "the model's hidden states are not numbers", code="engine_error")
    return vector if dimensions is None else vector / max(float(np.linalg.norm(vector)), 1e-30)


def _wire(vector: NDArray[np.float32], encoding: str | None) -> Any:
    """A list of numbers, or base64 of little-endian float32, as OpenAI's clients ask for."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
